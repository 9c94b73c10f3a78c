"""Detections are paired one to one, and each difference that matters is told."""

import pytest
import torch

from mmslak.analysis.detections import Agreement, Detections, compare, overlaps
from mmslak.analysis.export import ExportError

BOXES = torch.tensor([[10.0, 10, 110, 60], [10, 10, 110, 60], [200, 20, 240, 90]])
SCORES, LABELS = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([1, 2, 1])
MASKS = torch.linspace(0, 1, 3 * 4).reshape(3, 2, 2)
FOUND = Detections(BOXES, SCORES, LABELS, MASKS)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))


def check(got: Detections, expected: Detections = FOUND, limit: int = 100) -> Agreement:
    return compare(got, expected, threshold=0.05, limit=limit, where='x.onnx')


def without(index: int) -> Detections:
    keep = [i for i in range(3) if i != index]
    return Detections(*(part[keep] for part in FOUND))


def changed(part: str, index: int, value: float) -> Detections:
    new = getattr(FOUND, part).clone()
    new[index] += value
    return FOUND._replace(**{part: new})


def test_overlaps_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 2]], dtype=torch.float64)
    others = boxes.new_tensor([[0, 0, 4, 2], [2, 0, 6, 2], [5, 5, 6, 6], [1, 1, 1, 1]])
    assert overlaps(boxes, others).tolist() == [[1, 4 / 12, 0, 0]]


def test_the_same_in_another_order_agree():
    order = [2, 0, 1]
    assert check(Detections(*(part[order] for part in FOUND))) == Agreement(3, 1.0, 0.0, 0.0)
    assert check(NOTHING, NOTHING) == Agreement()


def test_the_worst_of_the_pairs_is_kept():
    moved = changed('boxes', 2, torch.tensor([0.0, 0, 0, 0.5]))
    found = check(changed('scores', 1, 5e-4)).merge(check(moved))
    assert found.pairs == 6
    assert found.iou == pytest.approx(70 / 70.5)
    assert found.score == pytest.approx(5e-4, rel=1e-3)
    assert check(changed('masks', 0, 5e-4)).mask == pytest.approx(5e-4, rel=1e-3)


@pytest.mark.parametrize(
    ('got', 'says'),
    [
        (without(0), r'finds class 1 at \(10.0, 10.0, 110.0, 60.0\) with score 0.900, .*nothing'),
        (NOTHING, 'finds class 1 .* nothing there .*: 0.000'),
        (changed('boxes', 2, torch.tensor([0.0, 0, 0, 2])), r'class 1 at \(200.*: 0.972'),
        (changed('labels', 1, 1), 'finds class 2'),
        (changed('scores', 2, -2e-3), 'the score of class 1 .* by 0.002, more than 0.001'),
        (changed('scores', 2, float('nan')), 'the score of class 1'),
        (changed('masks', 2, 2e-3), 'the mask of class 1'),
        (changed('masks', 2, float('nan')), 'the mask of class 1'),
        (changed('boxes', 0, float('nan')), 'finds class 1'),
    ],
)
def test_what_differs_is_told(got, says):
    with pytest.raises(ExportError, match=f'x.onnx: .*{says}'):
        check(got)


def test_one_too_many_is_told():
    with pytest.raises(ExportError, match=r'PyTorch does not find class 1 at .* 0\.300'):
        check(FOUND, without(2))
    twice = Detections(*(torch.cat([part, part[:1]]) for part in FOUND))
    with pytest.raises(ExportError, match='PyTorch does not find class 1'):
        check(twice)  # one to one


@pytest.mark.parametrize('side', ['got', 'expected'])
def test_what_rounding_takes_in_may_be_alone(side):
    alone = FOUND._replace(scores=torch.tensor([0.9, 0.8, 0.0505]))
    pair = dict(got=without(2), expected=without(2)) | {side: alone}
    assert check(**pair).pairs == 2  # above the threshold by less than the tolerance
    lower = FOUND._replace(scores=torch.tensor([0.9, 0.8, 0.03]))  # multiplied by centerness
    with pytest.raises(ExportError, match='class 1'):
        check(**pair | {side: lower})
    full = Detections(*(part[:2] for part in FOUND))
    other = Detections(*(part[[0, 2]] for part in FOUND))._replace(scores=torch.tensor([0.9, 0.8]))
    assert check(full, other, limit=2).pairs == 1  # the second of two that are allowed
    with pytest.raises(ExportError):
        check(full, other, limit=3)
