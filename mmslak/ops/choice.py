"""Which method computes what: 'auto' by device, dtype and shape, never by timing in training."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Methods(NamedTuple):
    """Names of the methods for the output, the gradient of x and those of the kernels."""

    forward: str
    input_gradient: str
    weight_gradient: str


def choose(backend: str, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Methods:
    """Methods for an input and kernels of the given (height, width).

    On a CPU oneDNN is near the machine's peak for strips and far from it for large squares and for
    all weight gradients, where the FFT wins from a certain reach on. Small maps stay native.
    """
    if backend != 'auto':
        return Methods(backend, backend, backend)
    square = max(min(size) for size in sizes)
    longest = max(max(size) for size in sizes)
    if x.device.type != 'cpu' or longest < 13 or min(x.shape[2:]) < 24:
        return Methods('native', 'native', 'native')
    return Methods('fft' if square > 13 else 'native', 'fft', 'fft')
