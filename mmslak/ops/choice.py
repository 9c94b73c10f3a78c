"""Which method computes what: 'auto' by device, dtype and shape, never by timing in training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmslak.ops.native import layout_of


class Methods(NamedTuple):
    """Names of the methods for the output, the gradient of x and those of the kernels."""

    forward: str
    input_gradient: str
    weight_gradient: str


def choose(backend: str, x: Tensor, weights: Sequence[Tensor], summed: bool) -> Methods:
    """Methods for an input (N, C, H, W) and kernels (C, 1, kH, kW).

    On a CPU, oneDNN is near the machine's peak for strips. It is far from it for all weight
    gradients and, on all but small maps, for large squares: there the FFT is faster. One FFT of x
    serves all kernels, so that on large maps the FFT is faster too where branches are summed, and
    where the weight gradients need the transforms anyway. 'rows' serves wide strips of large maps,
    'toeplitz' the weight gradients of thin kernels on small maps. Blocks of SLaK and PeLK are in
    NHWC; the choices for NCHW serve networks of users (measured: docs/operator.md).
    """
    if x.shape[0] == 0:  # an empty batch
        return Methods('native', 'native', 'native')
    if backend != 'auto':
        return Methods(backend, backend, backend)
    if x.device.type != 'cpu':
        return Methods('native', 'native', 'native')
    sizes = [tuple(weight.shape[2:]) for weight in weights]
    if max(max(size) for size in sizes) < 13:
        return Methods('native', 'native', 'native')
    square = max(min(size) for size in sizes) > 13 and max(x.shape[2:]) > 20
    large, nchw = min(x.shape[2:]) >= 96, layout_of(x) == torch.contiguous_format
    forward = 'native'
    if square or (summed and large and nchw):
        forward = 'fft'
    elif large and nchw and x.dtype == torch.float32:
        forward = 'rows'
    thin, full = max(min(size) for size in sizes) <= 7, x.dtype in (torch.float32, torch.float64)
    small = thin and full and max(x.shape[2:]) <= 32
    return Methods(forward, 'fft' if square or large else 'native', 'toeplitz' if small else 'fft')
