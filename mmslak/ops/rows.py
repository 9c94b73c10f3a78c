"""Forward only: wide strips through FFTs along the rows of large NCHW maps, other kernels natively.

A strip of 5×K needs no transform along H: five shifted products of row spectra replace K
multiplications per pixel. Upright strips stay native, which is as fast as their transforms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmslak.ops import native
from mmslak.ops.fft import CHUNK_BYTES, smooth_size


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    return native.convolve_each(_convolve, x, weights, bias, summed)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[2] > 7 or weight.shape[3] <= 2 * weight.shape[2]:  # no wide strip
        return native.forward(x, [weight])[0]
    height, width = x.shape[2:]
    rows, reach = weight.shape[2] // 2, weight.shape[3] // 2
    size = smooth_size(width + reach)
    laid = weight.new_zeros(len(weight), 2 * rows + 1, size, dtype=torch.float32)
    laid[..., : 2 * reach + 1] = weight[:, 0]
    # Networks correlate: conjugates of the kernel's spectrum.
    kernels = torch.fft.rfft(laid.roll(-reach, 2)).conj_physical()

    output = torch.empty_like(x)
    step = max(1, CHUNK_BYTES // (len(x) * height * (size // 2 + 1) * 8))
    for start in range(0, x.shape[1], step):
        channels = slice(start, start + step)
        spectrum = torch.fft.rfft(x[:, channels].float(), n=size)
        kernel = kernels[channels]
        total = spectrum * kernel[:, rows, None]
        for r in range(1, rows + 1):
            total[:, :, :-r].addcmul_(spectrum[:, :, r:], kernel[:, rows + r, None])
            total[:, :, r:].addcmul_(spectrum[:, :, :-r], kernel[:, rows - r, None])
        output[:, channels] = torch.fft.irfft(total, n=size)[..., :width]
    return output
