"""Depthwise convolution as batched products with banded (Toeplitz) matrices.

A kernel row k slides along W: that is a product of the map's rows with a W × W matrix that holds k
along its diagonals. All kernel rows together make one product per channel, which matrix units
compute fast. Kernels that are taller than wide are applied to the transposed map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmslak.ops.layouts import NCHW, in_layout
from mmslak.ops.native import convolve_each, crop_to_map
from mmslak.ops.plans import Case

# Bytes of the rows of x that a chunk of channels lays out for its weight gradient, to fit a cache.
CHUNK_BYTES = 1 << 22


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    return convolve_each(_convolve, in_layout(x, NCHW), weights, bias, summed)


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels; `gradients` holds one per kernel or one for their sum."""
    gradients = [in_layout(gradient, NCHW) for gradient in gradients]
    if len(gradients) < len(weights):
        gradients = list(gradients) * len(weights)
    dx = dws = None
    if input_gradient:  # the operator with the kernel turned by 180°
        kernels = [crop_to_map(weight, x.shape).flip((2, 3)) for weight in weights]
        dx = sum(_convolve(g, kernel) for g, kernel in zip(gradients, kernels, strict=True))
    if weight_gradients:
        x = in_layout(x, NCHW)
        dws = [torch.zeros_like(weight) for weight in weights]
        for dw, gradient in zip(dws, gradients, strict=True):
            inner = crop_to_map(dw, x.shape)
            inner.copy_(_weight_gradient(x, gradient, (inner.shape[2], inner.shape[3])))
    return dx, dws


def extra_bytes(case: Case) -> int:
    """Memory for the rows of x that meet a kernel's, and for the banded matrices."""
    channels, height, width = case.shape[1:]
    size = torch.empty((), dtype=case.dtype).element_size()
    needs = []
    for kernel in case.kernels:
        side = height if kernel[0] > kernel[1] else width
        needs.append(min(kernel) * (case.map_bytes + channels * side * side * size))
    return max(needs)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[2] > weight.shape[3]:
        return _convolve(x.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
    batch, _, height, _ = x.shape
    product = _rows(x, weight.shape[2]) @ _bands(weight, x.shape[3])  # (C, N·H, W)
    return product.unflatten(1, (batch, height)).transpose(0, 1)


def _weight_gradient(x: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient (C, 1, kH, kW) of kernels of that size."""
    if size[0] > size[1]:
        swapped = _weight_gradient(x.transpose(2, 3), gradient.transpose(2, 3), size[::-1])
        return swapped.transpose(2, 3)
    batch, channels, height, width = x.shape
    diagonals = _diagonals(width, size[1] // 2, x.device).to(x.dtype)
    step = max(1, CHUNK_BYTES // (batch * height * size[0] * width * x.element_size()))
    sums = []
    for start in range(0, channels, step):
        rows = _rows(x[:, start : start + step], size[0])
        outputs = _rows(gradient[:, start : start + step], 1)
        bands = rows.transpose(1, 2) @ outputs  # (c, kH·W, W), laid as in _bands
        sums.append(bands.view(-1, width * width) @ diagonals)
    return torch.cat(sums).view(channels, 1, *size)


def _rows(x: Tensor, rows: int) -> Tensor:
    """(C, N·H, rows·W): for each output row, the input rows that its kernel reaches."""
    batch, channels, height, width = x.shape
    x = x.transpose(0, 1).contiguous()
    windows = F.pad(x, (0, 0, rows // 2, rows // 2)).unfold(2, rows, 1).transpose(3, 4)
    # Contiguous: windows that overlap in memory are a slow path of batched products.
    return windows.contiguous().view(channels, batch * height, rows * width)


def _diagonals(width: int, reach: int, device: torch.device) -> Tensor:
    """(W·W, 2 reach + 1) of zeros and ones: a product with it sums a W × W matrix's diagonals."""
    columns = torch.arange(width, device=device)
    lags = torch.arange(-reach, reach + 1, device=device)
    return (columns[:, None] - columns == lags[:, None, None]).flatten(1).T


def _bands(weight: Tensor, width: int) -> Tensor:
    """(C, kH·W, W): entry (r·W + i, o) is the weight of input column i for output column o."""
    reach = weight.shape[3] // 2
    columns = torch.arange(width, device=weight.device)
    offset = columns[:, None] - columns[None, :] + reach
    inside = (offset >= 0) & (offset < weight.shape[3])
    bands = weight[:, 0][..., offset.clamp(0, weight.shape[3] - 1)] * inside
    return bands.flatten(1, 2)
