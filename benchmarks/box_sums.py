"""Peripheral convolution by box sums, which `depthwise.py` compares with mmslak's FFT."""

from collections.abc import Sequence

import torch
from torch import Tensor


def box_sums(x: Tensor, weight: Tensor, grid: Sequence[int]) -> Tensor:
    """PeLK's convolution in k'² instead of K² products: Y = Σ_ab w(a, b) · A_a X B_bᵀ.

    A_a and B_b, of 0 and 1, add up the rows of the a-th and the columns of the b-th interval.

    Args:
        x: (N, C, H, W).
        weight: Shared weights (C, 1, k', k').
        grid: The k' widths of `mmslak.models.peripheral.sharing_grid`.

    Returns:
        (N, C, H, W).
    """
    rows, columns = (bands(length, grid).to(x) for length in x.shape[2:])
    summed = torch.einsum('nchw,bvw->nchbv', x, columns)
    weighted = torch.einsum('nchbv,cab->ncahv', summed, weight[:, 0])
    return torch.einsum('ncahv,auh->ncuv', weighted, rows)


def bands(length: int, grid: Sequence[int]) -> Tensor:
    """(k', length, length) of 0 and 1: whether an interval, centred on a row, has another row."""
    offsets = torch.arange(length)[None] - torch.arange(length)[:, None] + sum(grid) // 2
    stops = torch.tensor(grid).cumsum(0)[:, None, None]
    starts = stops - torch.tensor(grid)[:, None, None]
    return ((starts <= offsets) & (offsets < stops)).float()
