"""Depthwise convolution as batched products with banded (Toeplitz) matrices.

A kernel row k slides along W: that is a product of the map's rows with a W × W matrix that holds k
along its diagonals. All kernel rows together make one product per channel, which matrix units
like. Kernels taller than wide are handled on their side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    if not summed:
        return [_convolve(x, weight) for weight in weights]
    total = sum(_convolve(x, weight) for weight in native.merged(weights))
    return [total if bias is None else total + bias.view(-1, 1, 1)]


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels; `gradients` holds one per kernel or one for their sum."""
    if len(gradients) < len(weights):
        gradients = list(gradients) * len(weights)
    pairs = list(zip(weights, gradients, strict=True))
    dx = dws = None
    if input_gradient:  # the operator with the kernel turned by 180°
        dx = sum(_convolve(gradient, weight.flip((2, 3))) for weight, gradient in pairs)
    if weight_gradients:
        dws = [_weight_gradient(x, g, (w.shape[2], w.shape[3])) for w, g in pairs]
    return dx, dws


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
    width = x.shape[3]
    rows = _rows(x, size[0])  # (C, N·H, kH·W)
    columns = gradient.transpose(0, 1).flatten(1, 2)  # (C, N·H, W)
    bands = (rows.transpose(1, 2) @ columns).unflatten(1, (size[0], width))
    # Diagonals become columns once the matrix is read in rows that are one element longer.
    reach = size[1] // 2
    flat = F.pad(bands.transpose(2, 3), (reach, reach)).flatten(2)
    sheared = F.pad(flat, (0, width)).unflatten(2, (width, width + 2 * reach + 1))
    return sheared[..., : size[1]].sum(2).unsqueeze(1)


def _rows(x: Tensor, rows: int) -> Tensor:
    """(C, N·H, rows·W): for each output row, the input rows that its kernel reaches."""
    padded = F.pad(x, (0, 0, rows // 2, rows // 2))
    windows = padded.unfold(2, rows, 1).transpose(3, 4)  # (N, C, H, rows, W)
    return windows.transpose(0, 1).flatten(3).flatten(1, 2)


def _bands(weight: Tensor, width: int) -> Tensor:
    """(C, kH·W, W): entry (r·W + i, o) is the weight of input column i for output column o."""
    reach = weight.shape[3] // 2
    columns = torch.arange(width, device=weight.device)
    offset = columns[:, None] - columns[None, :] + reach
    inside = (offset >= 0) & (offset < weight.shape[3])
    bands = weight[:, 0][..., offset.clamp(0, weight.shape[3] - 1)] * inside
    return bands.flatten(1, 2)
