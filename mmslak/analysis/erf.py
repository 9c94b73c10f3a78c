"""Effective receptive field: what each input pixel contributes to the centre of a feature map.

Protocol of RepLKNet (arXiv 2203.06717), which SLaK (arXiv 2207.03620) follows: gradient of the
rectified, summed central output with respect to the picture, rectified, summed over the pictures of
a batch and channels, averaged; scores are log10(x + 1), divided by their maximum.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


class ReceptiveField(NamedTuple):
    """What `effective_receptive_field` found.

    Attributes:
        matrix: (H, W), float64, on the CPU: the averaged contributions of the pixels, not negative.
        used: Number of inputs averaged over.
        skipped: Number of inputs left out because their gradient was not finite.
    """

    matrix: Tensor
    used: int
    skipped: int


class Area(NamedTuple):
    """A centred square of a receptive field: its side in pixels, its share of the picture."""

    side: int
    ratio: float


def effective_receptive_field(
    model: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Iterable[Tensor]
) -> ReceptiveField:
    """Averages the contributions of input pixels to the centre of the last feature map.

    Args:
        model: From pictures to a feature map (N, C, h, w), or to several, the last of which counts;
            in eval mode.
        images: Inputs (3, H, W) or (N, 3, H, W) of one size, on the model's device; the protocol
            takes 50 validation pictures of 1024×1024. The central output is at (h // 2, w // 2).

    Returns:
        The average, and how many inputs it is over.

    Raises:
        ValueError: If there is no input, every gradient is NaN, sizes differ, or the output is not
            a feature map.
    """
    total, used, skipped = None, 0, 0
    for image in images:
        x = image.detach().reshape(-1, *image.shape[-3:]).requires_grad_()
        with torch.enable_grad():
            output = model(x)
            output = output if isinstance(output, Tensor) else output[-1]
            if not isinstance(output, Tensor) or output.dim() != 4:
                given = tuple(output.shape) if isinstance(output, Tensor) else 'a list'
                raise ValueError(
                    f'a receptive field needs a feature map (N, C, h, w), the model gives {given}; '
                    'turn off pooling and class tokens by an option of its backbone'
                )
            centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(centre, x)
        contributions = gradient.relu().sum((0, 1)).cpu().double()  # MPS has no float64
        if not contributions.isfinite().all():
            skipped += 1
            continue
        if total is not None and total.shape != contributions.shape:
            raise ValueError(
                f'inputs of one size are needed, got {tuple(total.shape)} and '
                f'{tuple(contributions.shape)}'
            )
        total = contributions if total is None else total + contributions
        used += 1
    if total is None:
        raise ValueError(f'no gradient to average: {skipped} inputs, all with NaN or infinity')
    return ReceptiveField(total / used, used, skipped)


def contribution_scores(matrix: Tensor) -> Tensor:
    """log10(x + 1), divided by the maximum: (H, W) in [0, 1]; zeros where nothing contributes."""
    scores = torch.log10(matrix + 1)
    return scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny)


def high_contribution_area(erf: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> list[Area]:
    """Smallest centred squares that hold more than the given shares of all contributions.

    Squares have odd sides around (H // 2, W // 2); one that leaves the picture is cut there.

    Args:
        erf: Contributions (H, W), not negative; `contribution_scores` in the protocol.
        thresholds: Shares in [0, 1).

    Returns:
        One per threshold; side² / (H · W) is the ratio, at most 1.

    Raises:
        ValueError: If nothing contributes or a threshold is out of range.
    """
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise ValueError(f'thresholds: expected shares in [0, 1), got {tuple(thresholds)}')
    height, width = erf.shape
    if not erf.sum() > 0:
        raise ValueError('nothing contributes: the receptive field is zero everywhere')
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    radius = torch.maximum(rows[:, None], columns[None, :])
    held = torch.bincount(radius.flatten(), weights=erf.cpu().double().flatten()).cumsum(0)
    areas = []
    for threshold in thresholds:
        side = 2 * int((held > threshold * held[-1]).nonzero()[0]) + 1
        areas.append(Area(side, min(side, height) * min(side, width) / (height * width)))
    return areas
