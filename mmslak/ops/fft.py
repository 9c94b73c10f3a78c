"""Depthwise convolution through the FFT, in chunks of channels that stay in the cache.

The cost does not depend on the kernel's size. One transform of x serves all kernels and all weight
gradients; one transform of an output gradient serves the gradients of x and of its kernel.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# A chunk's spectrum of one tensor; a handful of them are alive at a time and share the L2 cache.
CHUNK_BYTES = 1 << 20


def forward(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW)."""
    plan = _Plan(x, weights)
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in weights]
    for channels in plan.chunks():
        spectrum = plan.transform(x[:, channels])
        for output, weight in zip(outputs, weights, strict=True):
            kernel = plan.kernel(weight[channels])
            output[:, channels] = plan.inverse(spectrum * kernel.conj())
    return outputs


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels, given one output gradient per kernel.

    Args:
        x: The input, (N, C, H, W).
        weights: The kernels, each (C, 1, kH, kW).
        gradients: Output gradients of x's shape.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradients: Whether those of the kernels are wanted.

    Returns:
        (gradient of x or None, gradients of the kernels or None), in their dtypes.
    """
    plan = _Plan(x, weights)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if input_gradient else None
    dws = [torch.zeros_like(weight) for weight in weights] if weight_gradients else None
    for channels in plan.chunks():
        spectrum = plan.transform(x[:, channels]) if weight_gradients else None
        total = None
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            spectrum_of_gradient = plan.transform(gradient[:, channels])
            if input_gradient:
                term = spectrum_of_gradient * plan.kernel(weight[channels])
                total = term if total is None else total.add_(term)
            if weight_gradients:
                product = (spectrum * spectrum_of_gradient.conj()).sum(0)
                plan.lags_(product, dws[i][channels])
        if input_gradient:
            dx[:, channels] = plan.inverse(total)
    return dx, dws


def smooth_size(size: int) -> int:
    """The next even number without prime factors above 5, for which FFTs are fast."""
    candidate = size + size % 2
    while True:
        rest = candidate
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
        candidate += 2


class _Plan:
    """Sizes of the circular convolution that holds the 'same' one, and the way in and out of it.

    A map of S and a kernel of K need S + K // 2 in length: then neither 'same' outputs nor the K
    lags of the weight gradient wrap around. Kernel rows that no pixel can reach are left out.
    """

    def __init__(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        self.batch, self.channels, self.height, self.width = x.shape
        reach = [max(min(w.shape[d] // 2, x.shape[d] - 1) for w in weights) for d in (2, 3)]
        self.size = (smooth_size(self.height + reach[0]), smooth_size(self.width + reach[1]))
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def chunks(self) -> Iterator[slice]:
        """Slices of channels."""
        element = 16 if self.dtype == torch.float64 else 8
        per_channel = self.batch * self.size[0] * (self.size[1] // 2 + 1) * element
        step = max(1, CHUNK_BYTES // per_channel)
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
        rows, columns = self._reach(weight)
        inner = self._inner(weight, rows, columns)
        laid = torch.zeros(len(weight), *self.size, dtype=self.dtype, device=weight.device)
        laid[:, : 2 * rows + 1, : 2 * columns + 1] = inner
        return torch.fft.rfft2(laid.roll((-rows, -columns), (1, 2)))

    def lags_(self, product: Tensor, gradient: Tensor) -> None:
        """Writes the lags of a cross-correlation's spectrum (c, …) into a kernel's gradient."""
        rows, columns = self._reach(gradient)
        correlation = torch.fft.irfft2(product, s=self.size).roll((rows, columns), (1, 2))
        lags = correlation[:, : 2 * rows + 1, : 2 * columns + 1]
        self._inner(gradient, rows, columns).copy_(lags)

    def _reach(self, weight: Tensor) -> tuple[int, int]:
        return (
            min(weight.shape[2] // 2, self.height - 1),
            min(weight.shape[3] // 2, self.width - 1),
        )

    @staticmethod
    def _inner(weight: Tensor, rows: int, columns: int) -> Tensor:
        """The (c, 2 rows + 1, 2 columns + 1) centre of kernels, as a view."""
        top, left = weight.shape[2] // 2 - rows, weight.shape[3] // 2 - columns
        return weight[:, 0, top : top + 2 * rows + 1, left : left + 2 * columns + 1]
