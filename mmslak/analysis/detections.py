"""Detections of one picture by two versions of a detector, compared box by box."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmslak.analysis.export import ExportError

IOU = 0.99  # of boxes that are the same
TOLERANCE = 1e-3  # of scores, and of the probabilities in masks


class Detections(NamedTuple):
    """What a detector finds in a picture.

    Attributes:
        boxes: (n, 4), x1, y1, x2, y2 in pixels.
        scores: (n,)
        labels: (n,) class of each.
        masks: (n, h, w) probabilities on a grid over the box; None of a detector without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    @classmethod
    def of_graph(cls, dets: Tensor, labels: Tensor, masks: Tensor | None = None) -> 'Detections':
        """From the outputs of a graph, for one picture, without what fills them up.

        Args:
            dets: (1, n, 5), boxes with scores; the scores are 0 where they are no detections.
            labels: (1, n)
            masks: (1, n, h, w)
        """
        real = dets[0, :, 4] > 0
        found = (dets[..., :4], dets[..., 4], labels, *(() if masks is None else (masks,)))
        return cls(*(part[0][real] for part in found))


class Agreement(NamedTuple):
    """How far two versions differ: the number of pairs, and the worst of them."""

    pairs: int = 0
    iou: float = 1.0
    score: float = 0.0
    mask: float = 0.0

    def merge(self, other: 'Agreement') -> 'Agreement':
        """Both together."""
        return Agreement(
            self.pairs + other.pairs,
            min(self.iou, other.iou),
            max(self.score, other.score),
            max(self.mask, other.mask),
        )


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) with others (m, 4), as (n, m)."""
    corner = torch.maximum(boxes[:, None, :2], others[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], others[:, 2:]) - corner).clamp_min(0)
    both = sides.prod(2)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return both / (areas[:, None] + other_areas - both).clamp_min(1e-12)


def compare(
    got: Detections, expected: Detections, threshold: float, limit: int, where: str
) -> Agreement:
    """Pairs the detections of an export with PyTorch's, class by class and one to one.

    Those that rounding alone takes in or out may be without a partner: scored within `TOLERANCE`
    of the threshold, or of the last of as many as are allowed.

    Args:
        got: The export's.
        expected: PyTorch's.
        threshold: Both leave out what scores less. FCOS and others compare with it before they
            multiply by centerness, so that some of their detections have lower scores.
        limit: The most detections of a picture.
        where: Name of export and picture in messages.

    Raises:
        ExportError: If a detection has no partner with an overlap of `IOU`, or a score or a mask
            differs by more than `TOLERANCE`.
    """
    lowest = threshold
    for one in (got, expected):
        if len(one.scores) >= limit:
            lowest = max(lowest, float(one.scores.min()))
    iou = overlaps(expected.boxes.double(), got.boxes.double())
    iou[expected.labels[:, None] != got.labels] = -1
    free = torch.ones(len(got.scores), dtype=torch.bool)
    agreement = Agreement()
    for i in expected.scores.argsort(descending=True).tolist():
        left = iou[i].masked_fill(~free, -1)
        best = float(left.max()) if len(left) else -1.0
        if not best >= IOU:
            if not abs(expected.scores[i] - lowest) <= TOLERANCE:
                raise ExportError(
                    f'{where}: PyTorch finds {_words(expected, i)}, the export has nothing there '
                    f'(largest overlap with one of this class: {max(best, 0):.3f})'
                )
            continue
        j = int(left.argmax())
        free[j] = False
        score = float((expected.scores[i] - got.scores[j]).abs())
        mask = 0.0
        if expected.masks is not None:
            mask = float((expected.masks[i] - got.masks[j]).abs().max())
        for name, difference in (('score', score), ('mask', mask)):
            if not difference <= TOLERANCE:  # NaN fails too
                raise ExportError(
                    f'{where}: the {name} of {_words(expected, i)} differs from PyTorch by '
                    f'{difference:.2g}, more than {TOLERANCE:g}'
                )
        agreement = agreement.merge(Agreement(1, best, score, mask))
    for j in free.nonzero()[:, 0].tolist():
        if not abs(got.scores[j] - lowest) <= TOLERANCE:
            raise ExportError(f'{where}: PyTorch does not find {_words(got, j)}')
    return agreement


def _words(found: Detections, index: int) -> str:
    box = ', '.join(f'{side:.1f}' for side in found.boxes[index].tolist())
    return (
        f'class {int(found.labels[index])} at ({box}) with score {float(found.scores[index]):.3f}'
    )
