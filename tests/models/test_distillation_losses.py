"""Losses of distillation against plain Python in float64, and where the answer is known."""

import math
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmslak.models import CWD, KD, NKD
from tests.no_waiting import NoWaiting

LABELS = torch.tensor([2, 0, 4])
# Of Mixup; the largest are LABELS.
SCORES = torch.tensor([[0.3, 0, 0.7, 0, 0], [0.6, 0, 0, 0.4, 0], [0, 0, 0, 0, 1.0]])


def logits(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = logits(3, 5, seed=0), logits(3, 5, seed=1)


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def cross(of: list[float], under: list[float]) -> float:
    return -sum(p * math.log(q) for p, q in zip(of, under, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def nkd(student: list[float], teacher: list[float], y: int, t: float, alpha: float) -> float:
    """The formula of the paper for a picture."""
    others = [i for i in range(len(student)) if i != y]
    n = [softmax([row[i] for i in others], t) for row in (teacher, student)]
    first = -softmax(teacher)[y] * math.log(softmax(student)[y])
    return first + alpha * t**2 * cross(*n)


def divergence(student: list[float], teacher: list[float], t: float) -> float:
    p, q = softmax(teacher, t), softmax(student, t)
    return t**2 * (cross(p, q) - cross(p, p))


@pytest.mark.parametrize('target', [LABELS, SCORES], ids=['labels', 'mixup'])
@pytest.mark.parametrize(('temperature', 'alpha'), [(1.0, 1.0), (3.0, 0.5)])
def test_nkd_is_the_formula(temperature, alpha, target):
    rows = zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True)
    expected = mean([nkd(*row, temperature, alpha) for row in rows])
    found = NKD(temperature, alpha)(STUDENT, TEACHER, target)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_nkd_of_models_that_know_nothing():
    """t_y is 1/5 and −log s_y log 5; of the other four classes, each has a quarter."""
    found = NKD(temperature=2.0)(torch.zeros(3, 5), torch.zeros(3, 5), LABELS)
    assert float(found) == pytest.approx(math.log(5) / 5 + 4 * math.log(4))


def test_nkd_of_a_sure_teacher_is_the_cross_entropy():
    sure = 1000.0 * torch.nn.functional.one_hot(LABELS, 5)
    found = NKD(alpha=0.0)(STUDENT, sure.double(), LABELS)
    assert float(found) == pytest.approx(float(cross_entropy(STUDENT, LABELS)), rel=1e-12)
    assert NKD()(STUDENT, sure.double(), LABELS).isfinite()


def test_nkd_of_equal_students_pulls_the_target_alone():
    """The second term is at its least; the first has a gradient of t_y · (s_i − [i = y]) / N."""
    student = TEACHER.clone().requires_grad_()
    NKD(temperature=2.0)(student, TEACHER, LABELS).backward()
    scores = TEACHER.softmax(1)
    true = scores.gather(1, LABELS[:, None])
    expected = true * (scores - torch.nn.functional.one_hot(LABELS, 5)) / 3
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize('target', [LABELS, SCORES], ids=['labels', 'mixup'])
def test_kd_is_the_formula(target):
    rows = list(zip(STUDENT.tolist(), TEACHER.tolist(), strict=True))
    scores = torch.eye(5)[LABELS] if target is LABELS else SCORES
    smooth = (0.9 * scores.double() + 0.1 / 5).tolist()
    labels = mean([cross(p, softmax(s)) for p, (s, _) in zip(smooth, rows, strict=True)])
    kd = KD(temperature=3.0, alpha=0.3, label_smoothing=0.1)
    expected = 0.3 * mean([divergence(*row, 3.0) for row in rows]) + 0.7 * labels
    assert float(kd(STUDENT, TEACHER, target)) == pytest.approx(expected, rel=1e-7)

    best = mean([-math.log(softmax(s)[t.index(max(t))]) for s, t in rows])
    hard = KD(hard=True, label_smoothing=0.1)(STUDENT, TEACHER, target)
    assert float(hard) == pytest.approx((labels + best) / 2, rel=1e-7)


def test_kd_at_its_limits():
    labels = float(cross_entropy(STUDENT, LABELS))
    assert float(KD(alpha=0.25)(STUDENT, STUDENT, LABELS)) == pytest.approx(0.75 * labels)
    assert float(KD(alpha=0.0)(STUDENT, TEACHER, LABELS)) == pytest.approx(labels)
    # Of a high temperature half the variance of what the logits differ by is left.
    hot = KD(temperature=1e4, alpha=1.0)(STUDENT, TEACHER, LABELS)
    variance = (STUDENT - TEACHER).var(1, unbiased=False).mean()
    assert float(hot) == pytest.approx(float(variance) / 2, rel=1e-3)


def test_cwd_is_the_formula():
    student, teacher = logits(2, 3, 2, 4, seed=2), logits(2, 3, 2, 4, seed=3)
    channels = zip(
        chain(*student.flatten(2).tolist()), chain(*teacher.flatten(2).tolist()), strict=True
    )
    expected = 3 * mean([divergence(s, t, 4.0) for s, t in channels])
    assert float(CWD()(student, teacher)) == pytest.approx(expected, rel=1e-10)


def test_cwd_at_its_limits():
    student = logits(2, 3, 4, 4, seed=4)
    shifted = student + logits(2, 3, 1, 1, seed=5)  # a channel's level says nothing about where
    assert float(CWD()(student, shifted)) == pytest.approx(0, abs=1e-12)
    somewhere = torch.zeros(1, 1, 4, 4)
    somewhere[0, 0, 2, 1] = 1e4  # a teacher that is sure of one of 16 positions
    found = CWD(temperature=2.0, weight=0.5)(torch.zeros(1, 1, 4, 4), somewhere)
    assert float(found) == pytest.approx(0.5 * 4 * math.log(16))


def test_cwd_resizes_the_teacher():
    teacher = torch.arange(4.0).view(1, 1, 1, 4)
    larger = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).expand(1, 1, 2, 8)
    assert float(CWD()(larger, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(CWD()(larger.flip(3), teacher)) > 0.1


@pytest.mark.parametrize(
    ('loss', 'shape', 'target'),
    [
        (NKD(), (3, 5), [LABELS]),
        (NKD(), (3, 5), [SCORES]),
        (KD(), (3, 5), [LABELS]),
        (KD(hard=True), (3, 5), [SCORES]),
        (CWD(), (2, 3, 4, 4), []),
    ],
)
def test_the_host_does_not_wait_for_a_gpu(loss, shape, target):
    student, teacher = (logits(*shape, seed=seed).requires_grad_() for seed in (6, 7))
    with NoWaiting():
        loss(student, teacher.detach(), *target).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('loss', 'shape', 'target'),
    [(NKD(), (3, 5), [LABELS]), (KD(), (3, 5), [SCORES]), (CWD(), (2, 3, 4, 4), [])],
    ids=['nkd', 'kd', 'cwd'],
)
def test_half_precision_is_summed_in_float32(loss, shape, target, dtype):
    student, teacher = (logits(*shape, seed=seed).to(dtype) for seed in (6, 7))
    found = loss(student, teacher, *target)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(student.float(), teacher.float(), *target))
