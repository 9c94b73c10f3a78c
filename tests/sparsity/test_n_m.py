import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmslak.sparsity import Masks, drop_and_grow_n_m, is_n_m, n_m_mask, to_semi_structured_


def test_the_two_highest_of_each_four():
    scores = torch.tensor([[4.0, 1, 3, 2, 0, 0, 0, 5]])
    assert n_m_mask(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 0, 0, 1]]


def test_groups_lie_along_the_input():
    scores = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    assert n_m_mask(scores, 1, 2).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize(
    ('scores', 'n', 'm', 'message'),
    [
        (torch.ones(2, 6), 2, 4, 'in a multiple of 4'),
        (torch.ones(8), 2, 4, 'in a multiple of 4'),
        (torch.ones(2, 4), 4, 4, 'needs 0 < n < m, got 4:4'),
        (torch.full((2, 4), math.nan), 2, 4, 'NaN'),
    ],
)
def test_what_cannot_be_n_m(scores, n, m, message):
    with pytest.raises(ValueError, match=message):
        n_m_mask(scores, n, m)


@pytest.mark.parametrize(
    ('mask', 'at_most', 'exactly'),
    [
        ([[1, 1, 0, 0]], True, True),
        ([[1, 0, 0, 0]], True, False),
        ([[1, 1, 0, 0, 0, 1, 0, 0]], True, False),
        ([[1, 1, 1, 0]], False, False),
        ([[1, 1]], False, False),
    ],
)
def test_is_n_m(mask, at_most, exactly):
    assert is_n_m(torch.tensor(mask), 2, 4) == at_most
    assert is_n_m(torch.tensor(mask), 2, 4, exactly=True) == exactly


def test_one_weight_moves_within_the_group_that_has_the_smallest():
    weight = torch.tensor([[5.0, 1, 0, 0], [3, 4, 0, 0]])
    scores = torch.tensor([[0.0, 0, 1, 2], [0, 0, 2, 1]])
    new = drop_and_grow_n_m(weight, weight != 0, scores, 1, 2, 4)
    assert new.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]
    new = drop_and_grow_n_m(weight, weight != 0, scores, 9, 2, 4)
    assert new.int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


def test_a_mask_that_is_not_n_m_is_refused():
    with pytest.raises(ValueError, match='does not have 2 of every 4'):
        drop_and_grow_n_m(torch.ones(1, 4), torch.ones(1, 4).bool(), torch.ones(1, 4), 1, 2, 4)


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 8)]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 99),
)
def test_updates_keep_every_group(rows, groups, n_m, rate, seed):
    n, m = n_m
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * m, generator=generator)
    masks = Masks({'w': n_m_mask(weight.abs(), n, m)})
    weight *= masks.active['w']
    update = masks.update({'w': weight}, rate, seed=seed, n_m=n_m)
    assert (masks.active['w'].reshape(-1, m).sum(1) == n).all()
    most = min(math.ceil(rate * rows * groups * n), rows * groups)
    assert int(update.grown['w'].sum()) <= most


def test_semi_structured_weights_need_a_gpu():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(n_m_mask(layer.weight.abs(), 2, 4))
    with pytest.raises(RuntimeError, match='2:4 weights need an NVIDIA GPU'):
        to_semi_structured_(nn.Sequential(layer))
    assert to_semi_structured_(nn.Sequential(nn.Linear(64, 64))) == 0  # dense: left alone
