"""Which method computes what: 'auto' by device, dtype and shape, never by timing in training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Methods(NamedTuple):
    """Names of the methods for the output, the gradient of x and those of the kernels."""

    forward: str
    input_gradient: str
    weight_gradient: str


def choose(backend: str, x: Tensor, weights: Sequence[Tensor], summed: bool) -> Methods:
    """Methods for an input (N, C, H, W) and kernels (C, 1, kH, kW).

    On a CPU oneDNN is near the machine's peak for strips and far from it for large squares on all
    but small maps and for all weight gradients, where the FFT wins. An FFT of x costs the same for
    one kernel as for all, so on large maps it is ahead where the branches are summed up, or where
    the weight gradients have transformed everything already. 'rows' serves wide strips of large
    maps, matrix products the weight gradients of thin kernels on small maps.
    """
    if x.shape[0] == 0:  # nothing to be fast with
        return Methods('native', 'native', 'native')
    if backend != 'auto':
        return Methods(backend, backend, backend)
    if x.device.type != 'cpu':
        return Methods('native', 'native', 'native')
    sizes = [tuple(weight.shape[2:]) for weight in weights]
    if max(max(size) for size in sizes) < 13:
        return Methods('native', 'native', 'native')
    square = max(min(size) for size in sizes) > 13 and max(x.shape[2:]) > 20
    large, nchw = min(x.shape[2:]) >= 96, x.is_contiguous()
    forward = 'native'
    if square or (summed and large and nchw):
        forward = 'fft'
    elif large and nchw and x.dtype == torch.float32:
        forward = 'rows'
    thin, full = max(min(size) for size in sizes) <= 7, x.dtype in (torch.float32, torch.float64)
    small = thin and full and max(x.shape[2:]) <= 32
    return Methods(forward, 'fft' if square or large else 'native', 'toeplitz' if small else 'fft')
