"""Depthwise convolution through the FFT, in chunks of channels that stay in the cache.

The cost hardly depends on the kernel's size. One transform of x serves all kernels and all weight
gradients; one transform of an output gradient serves the gradients of x and of its kernel. A kernel
with a short side (a strip, a small kernel) is transformed by products with thin Fourier matrices.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmslak.ops.layouts import NCHW, in_layout
from mmslak.ops.native import crop_to_map

# Bytes of a tensor's spectrum in a chunk; a few of them are in use at once and share the L2 cache.
CHUNK_BYTES = 1 << 21
# On a GPU a chunk of a few channels would leave most of it idle: here they bound the memory.
GPU_CHUNK_BYTES = 1 << 28
# Up to this many rows (or columns) a product with a Fourier matrix beats a padded FFT.
SHORT_SIDE = 13


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    x = in_layout(x, NCHW)  # transforms read one map at a time, which is slow in NHWC
    plan = _Plan(x, weights)
    outputs = [torch.empty_like(x) for _ in range(1 if summed else len(weights))]
    for channels in plan.chunks():
        spectrum = plan.transform(x[:, channels])
        kernels = [plan.kernel(weight[channels]) for weight in weights]
        for output, kernel in zip(outputs, [sum(kernels)] if summed else kernels, strict=True):
            # Networks correlate: the kernel is not flipped, hence the conjugate. A lazy one, as
            # conj() makes, is lost where AOTAutograd calls the operator (opcheck finds it).
            output[:, channels] = plan.inverse(spectrum * kernel.conj_physical())
    if bias is not None:
        outputs[0] += bias.view(-1, 1, 1)
    return outputs


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels.

    Args:
        x: The input, (N, C, H, W).
        weights: The kernels, each (C, 1, kH, kW).
        gradients: Output gradients of x's shape: one per kernel, or one for the sum of all.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradients: Whether those of the kernels are wanted.

    Returns:
        (gradient of x or None, gradients of the kernels or None), in their dtypes.
    """
    gradients = [in_layout(gradient, NCHW) for gradient in gradients]
    x = in_layout(x, NCHW) if weight_gradients else x
    dx = torch.empty_like(gradients[0]) if input_gradient else None
    dws = [torch.zeros_like(weight) for weight in weights] if weight_gradients else None
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    plan = _Plan(x, weights)
    branches = (
        [list(range(len(weights)))] if len(gradients) == 1 else [[i] for i in range(len(weights))]
    )
    for channels in plan.chunks():
        spectrum = plan.transform(x[:, channels]).conj_physical() if weight_gradients else None
        total = None
        for gradient, indices in zip(gradients, branches, strict=True):
            spectrum_of_gradient = plan.transform(gradient[:, channels])
            if input_gradient:
                kernel = sum(plan.kernel(weights[i][channels]) for i in indices)
                if total is None:
                    total = spectrum_of_gradient * kernel
                else:
                    total.addcmul_(spectrum_of_gradient, kernel)
            if weight_gradients:
                product = (spectrum * spectrum_of_gradient).sum(0)
                for i in indices:
                    plan.lags_(product, crop_to_map(dws[i], x.shape)[channels])
        if input_gradient:
            dx[:, channels] = plan.inverse(total)
    return dx, dws


def smooth_size(size: int) -> int:
    """The next even number without prime factors above 5, for which FFTs are fast.

    Between 48 and 128 a multiple of 16 is worth its few more elements (measured on x86).
    """
    step = 16 if 48 < size <= 128 else 2
    candidate = -(-size // step) * step
    while True:
        rest = candidate
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
        candidate += step


class _Plan:
    """Sizes of the circular convolution that contains the 'same' one, and its transforms.

    A map of S and a kernel of K need S + K // 2 in length: then neither 'same' outputs nor the K
    lags of the weight gradient wrap around.
    """

    def __init__(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        self.batch, self.channels, self.height, self.width = x.shape
        reach = [max(weight.shape[d] // 2 for weight in weights) for d in (2, 3)]
        self.size = (smooth_size(self.height + reach[0]), smooth_size(self.width + reach[1]))
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.device = x.device

    def chunks(self) -> Iterator[slice]:
        """Slices of channels."""
        element = 16 if self.dtype == torch.float64 else 8
        per_channel = self.batch * self.size[0] * (self.size[1] // 2 + 1) * element
        limit = CHUNK_BYTES if self.device.type == 'cpu' else GPU_CHUNK_BYTES
        step = max(1, limit // per_channel)
        for start in range(0, self.channels, step):
            yield slice(start, min(start + step, self.channels))

    def transform(self, maps: Tensor) -> Tensor:
        """Spectrum of maps (N, c, H, W)."""
        return torch.fft.rfft2(maps.to(self.dtype), s=self.size)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Maps (N, c, H, W) of a spectrum."""
        return torch.fft.irfft2(spectrum, s=self.size)[..., : self.height, : self.width]

    def kernel(self, weight: Tensor) -> Tensor:
        """Spectrum (c, …) of kernels (c, 1, kH, kW), laid around the origin."""
        rows, columns = weight.shape[2] // 2, weight.shape[3] // 2
        inner = weight[:, 0].to(self.dtype)
        if 2 * min(rows, columns) + 1 > SHORT_SIDE:
            laid = inner.new_zeros(len(weight), *self.size)
            laid[:, : 2 * rows + 1, : 2 * columns + 1] = inner
            return torch.fft.rfft2(laid.roll((-rows, -columns), (1, 2)))
        down, across = self._fourier(0, rows), self._fourier(1, columns)
        inner = inner.to(down.dtype)
        if rows < columns:
            return down @ (inner @ across.T)
        return (down @ inner) @ across.T

    def lags_(self, product: Tensor, gradient: Tensor) -> None:
        """Writes a cross-correlation's lags into a kernel's gradient.

        `product` (c, …) is the spectrum of the output's gradient times the conjugate of x's: the
        conjugate of the wanted spectrum, so that a forward transform inverts it.
        """
        rows, columns = gradient.shape[2] // 2, gradient.shape[3] // 2
        inner = gradient[:, 0]
        if 2 * min(rows, columns) + 1 > SHORT_SIDE:
            correlation = torch.fft.irfft2(product.conj_physical(), s=self.size).roll(
                (rows, columns), (1, 2)
            )
            inner.copy_(correlation[:, : 2 * rows + 1, : 2 * columns + 1])
            return
        down = self._fourier(0, rows).T
        across = self._fourier(1, columns) * self._half_weights()[:, None]
        if rows < columns:
            inner.copy_(((down @ product) @ across).real)
        else:
            inner.copy_((down @ (product @ across)).real)

    def _fourier(self, axis: int, reach: int) -> Tensor:
        """Fourier matrix of an axis: all frequencies along H, half of them along W."""
        rows = self.size[axis] if axis == 0 else self.size[axis] // 2 + 1
        # What is made while a CUDA graph is captured belongs to the graph: it must not be kept.
        capturing = self.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        make = _fourier_matrix.__wrapped__ if capturing else _fourier_matrix
        return make(self.size[axis], rows, reach, self.dtype, self.device)

    def _half_weights(self) -> Tensor:
        """Share of each half-spectrum column in the real inverse: all but the ends count twice."""
        height, width = self.size
        weights = torch.full((width // 2 + 1,), 2.0, dtype=self.dtype, device=self.device)
        weights[0] = weights[-1] = 1.0
        return weights / (height * width)


@functools.lru_cache(maxsize=64)
def _fourier_matrix(
    size: int, frequencies: int, reach: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """exp(-2πi f r / size) of shape (frequencies, 2 · reach + 1), computed in float64."""
    maker = device if device.type == 'cuda' else torch.device('cpu')  # no copy to a GPU, no wait
    with torch.inference_mode(False):
        options = dict(dtype=torch.float64, device=maker)
        f, r = torch.arange(frequencies, **options), torch.arange(-reach, reach + 1, **options)
        angle = f[:, None] * r * (-2 * math.pi / size)
        matrix = torch.polar(torch.ones_like(angle), angle)
        return matrix.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
