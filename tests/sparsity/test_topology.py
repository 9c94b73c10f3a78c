import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmslak import sparsity
from mmslak.sparsity import drop, drop_and_grow, drop_count, grow

T, F = True, False
SHAPES = [(1,), (7,), (3, 4), (2, 1, 51, 5), (4, 3, 1, 1)]


@st.composite
def layers(draw):
    """(weight, mask, growth scores, rate): weights with ties and zeros, all zeros, all equal."""
    shape = draw(st.sampled_from(SHAPES))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    kind = draw(st.sampled_from(['normal', 'ties', 'zero', 'equal']))
    weight = {
        'normal': torch.randn(shape, generator=generator),
        'ties': torch.randint(-2, 3, shape, generator=generator).float(),
        'zero': torch.zeros(shape),
        'equal': torch.full(shape, -0.5),
    }[kind] * mask
    scores = torch.randint(0, 3, shape, generator=generator).float()
    return weight, mask, scores, draw(st.sampled_from([0.0, 0.07, 0.3, 0.5, 1.0]))


@given(layers(), st.sampled_from(sparsity.DROP_METHODS))
def test_drop_takes_exactly_so_many_of_the_active(layer, method):
    weight, mask, _, rate = layer
    nnz = int(mask.sum())
    count = drop_count(nnz, rate)
    kept = drop(weight, mask, count, method)
    assert int(kept.sum()) == nnz - count
    assert not (kept & ~mask).any()
    dropped = mask & ~kept
    if method == 'magnitude' and kept.any() and dropped.any():
        assert weight[dropped].abs().max() <= weight[kept].abs().min()


@given(layers())
def test_grow_takes_exactly_so_many_of_the_inactive(layer):
    _, mask, scores, rate = layer
    count = int(rate * int((~mask).sum()))
    new = grow(mask, scores, count)
    grown = new & ~mask
    assert int(grown.sum()) == count
    assert not (mask & ~new).any()
    left = ~new
    if grown.any() and left.any():
        assert scores[grown].min() >= scores[left].max()


@given(layers(), st.sampled_from(sparsity.DROP_METHODS))
def test_drop_and_grow_conserves_the_number_of_nonzeros(layer, method):
    weight, mask, scores, rate = layer
    count = drop_count(int(mask.sum()), rate)
    new = drop_and_grow(weight, mask, scores, count, method)
    assert int(new.sum()) == int(mask.sum())
    kept = drop(weight, mask, count, method)
    assert not (kept & ~new).any()  # grown comes on top of kept


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_drop_count_is_the_ceiling(nnz, rate):
    count = drop_count(nnz, rate)
    assert 0 <= count <= nnz
    assert count == pytest.approx(rate * nnz, abs=1 + 1e-6 * nnz)
    assert count >= rate * nnz - 1e-6 * nnz


def test_drop_count_literal():
    assert [drop_count(100, r) for r in (0.0, 0.005, 0.07, 0.3, 1.0)] == [0, 1, 7, 30, 100]
    with pytest.raises(ValueError, match='prune rate must be in'):
        drop_count(10, 1.1)


def test_drop_literal():
    weight = torch.tensor([[0.1, -3.0, 2.0], [0.5, -0.2, 9.0]])
    mask = torch.tensor([[T, T, F], [T, T, T]])
    assert drop(weight, mask, 2).tolist() == [[F, T, F], [T, F, T]]
    # SET: of 3 positive and 2 negative weights, 1.2 and 0.8 of the two: 0.1 and -0.2 go.
    assert drop(weight, mask, 2, 'set').tolist() == [[F, T, F], [T, F, T]]
    # Three: 1.8 and 1.2, so 0.1, 0.5 and -0.2.
    assert drop(weight, mask, 3, 'set').tolist() == [[F, T, F], [F, F, T]]


def test_equal_ones_go_by_lowest_index():
    ones, mask = torch.ones(5), torch.ones(5, dtype=torch.bool)
    assert drop(ones, mask, 2).tolist() == [F, F, T, T, T]
    assert grow(~mask, ones, 2).tolist() == [T, T, F, F, F]


def test_grow_literal():
    mask = torch.tensor([T, F, F, F])
    scores = torch.tensor([9.0, 1.0, 3.0, 2.0])
    assert grow(mask, scores, 2).tolist() == [T, F, T, T]


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda w, m: drop(w, m, 5), 'cannot drop 5 of 2 active'),
        (lambda w, m: drop(w, m, 1, 'best'), "unknown drop method 'best', known: magnitude, set"),
        (lambda w, m: drop(w[:1], m, 1), 'differ in shape'),
        (lambda w, m: drop(w, m.float(), 1), 'mask must be bool'),
        (lambda w, m: drop(w * math.nan, m, 1), 'some are NaN'),
        (lambda w, m: grow(m, w, 3), 'cannot grow 3 weights in 1 free'),
        (lambda w, m: grow(m, w * math.nan, 1), 'some are NaN'),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([T, T, F]))


def test_set_keeps_the_outermost_of_either_sign():
    weight = torch.tensor([0.0, 4.0, -1.0, 2.0, -5.0, 0.0, -3.0, 1.0])
    mask = torch.ones(8, dtype=torch.bool)
    assert drop(weight, mask, 1, 'set').tolist() == [F, T, T, T, T, T, T, T]
    # Both zeros, then one of three on either side.
    assert drop(weight, mask, 4, 'set').tolist() == [F, T, F, T, T, F, T, F]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    weight = torch.tensor([3.0, -1.0, 2.0, 0.0], dtype=dtype)
    mask = torch.tensor([T, T, T, F])
    assert drop(weight, mask, 2).tolist() == [T, F, F, F]
    assert grow(~mask, weight, 2).tolist() == [T, F, T, T]


def test_integer_scores_are_refused():
    with pytest.raises(ValueError, match=r'cannot rank torch\.uint8'):
        grow(torch.tensor([F, F]), torch.tensor([0, 1], dtype=torch.uint8), 1)


def test_a_dropped_weight_may_come_back():
    weight, mask = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([T, T, F])
    assert drop_and_grow(weight, mask, torch.tensor([9.0, 0.0, 1.0]), 1).tolist() == [T, T, F]
    dense = torch.ones(3, dtype=torch.bool)
    assert drop_and_grow(weight, dense, torch.zeros(3), 3).tolist() == [T, T, T]
