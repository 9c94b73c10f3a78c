"""Effective receptive field: what each input pixel contributes to one place of a feature map.

Protocol of RepLKNet (arXiv 2203.06717), which SLaK (arXiv 2207.03620) follows: gradient of the
rectified, summed central output with respect to the picture, rectified, summed over the pictures of
a batch and channels, averaged; scores are log10(x + 1), divided by their maximum. Any other place
is treated likewise.
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
    """A square of a receptive field: its side in pixels, its share of the picture."""

    side: int
    ratio: float


def effective_receptive_field(
    model: Callable[[Tensor], Tensor | Sequence[Tensor]],
    images: Iterable[Tensor],
    at: tuple[int, int] | None = None,
    stage: int | None = None,
) -> ReceptiveField:
    """Averages the contributions of input pixels to one place of a feature map.

    Args:
        model: From pictures to a feature map (N, C, h, w), or to several; in eval mode.
        images: Inputs (3, H, W) or (N, 3, H, W) of one size, on the model's device; the protocol
            takes 50 validation pictures of 1024×1024.
        at: (row, column) of an input pixel. The place is the output that lies over it. None takes
            the centre, the output at (h // 2, w // 2), which is also that of (H // 2, W // 2).
        stage: Which of several feature maps, from 0; None takes the last.

    Returns:
        The average, and how many inputs it is over.

    Raises:
        ValueError: If there is no input, every gradient is NaN, sizes differ, the pixel or the
            stage does not exist, or the output is not a feature map.
    """
    total, used, skipped = None, 0, 0
    for image in images:
        x = image.detach().reshape(-1, *image.shape[-3:]).requires_grad_()
        size = tuple(x.shape[2:])
        row, column = (length // 2 for length in size) if at is None else at
        if not (0 <= row < size[0] and 0 <= column < size[1]):
            raise ValueError(f'at={at}: expected a (row, column) of inputs of {size[0]}×{size[1]}')
        with torch.enable_grad():
            output = _feature_map(model(x), stage)
            row, column = map(_over, (row, column), size, output.shape[2:])
            (gradient,) = torch.autograd.grad(output[:, :, row, column].relu().sum(), x)
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


def _feature_map(output: Tensor | Sequence[Tensor], stage: int | None) -> Tensor:
    """The feature map of a stage, or the last one."""
    outputs = [output] if isinstance(output, Tensor) else output
    if stage is not None and not 0 <= stage < len(outputs):
        raise ValueError(f'stage={stage}: the model gives {len(outputs)} feature maps, from 0')
    chosen = outputs[-1 if stage is None else stage]
    if not isinstance(chosen, Tensor) or chosen.dim() != 4:
        given = tuple(chosen.shape) if isinstance(chosen, Tensor) else 'a list'
        raise ValueError(
            f'a receptive field needs a feature map (N, C, h, w), the model gives {given}; '
            'turn off pooling and class tokens by an option of its backbone'
        )
    return chosen


def _over(pixel: int, length: int, outputs: int) -> int:
    """The output that the middle of a pixel lies in, where outputs divide the length equally.

    For length // 2 it is outputs // 2, whatever the two are.
    """
    return (2 * pixel + 1) * outputs // (2 * length)


def contribution_scores(matrix: Tensor) -> Tensor:
    """log10(x + 1), divided by the maximum: (H, W) in [0, 1]; zeros where nothing contributes."""
    scores = torch.log10(matrix + 1)
    return scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny)


def high_contribution_area(
    erf: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    at: tuple[int, int] | None = None,
) -> list[Area]:
    """Smallest squares around a place that hold more than the given shares of all contributions.

    Squares have odd sides; one that leaves the picture is cut there.

    Args:
        erf: Contributions (H, W), not negative; `contribution_scores` in the protocol.
        thresholds: Shares in [0, 1).
        at: (row, column) of the squares' centre; None takes (H // 2, W // 2).

    Returns:
        One per threshold; its ratio is the share of the picture that the square covers.

    Raises:
        ValueError: If nothing contributes, a threshold is out of range, or the place is not in the
            picture.
    """
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise ValueError(f'thresholds: expected shares in [0, 1), got {tuple(thresholds)}')
    height, width = erf.shape
    row, column = (height // 2, width // 2) if at is None else at
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f'at={at}: expected a (row, column) of a picture of {height}×{width}')
    if not erf.sum() > 0:
        raise ValueError('nothing contributes: the receptive field is zero everywhere')
    rows = (torch.arange(height) - row).abs()
    columns = (torch.arange(width) - column).abs()
    radius = torch.maximum(rows[:, None], columns[None, :])
    held = torch.bincount(radius.flatten(), weights=erf.cpu().double().flatten()).cumsum(0)
    areas = []
    for threshold in thresholds:
        reach = int((held > threshold * held[-1]).nonzero()[0])
        covered = int((rows <= reach).sum()) * int((columns <= reach).sum())
        areas.append(Area(2 * reach + 1, covered / (height * width)))
    return areas
