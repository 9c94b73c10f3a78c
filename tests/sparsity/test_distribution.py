import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmslak import sparsity
from tests.golden import GOLDEN

SHAPES = {'a': (10, 10), 'b': (4, 5), 'c': (8, 1, 5, 1)}

shapes_strategy = st.dictionaries(
    st.text('abcdef', min_size=1, max_size=3),
    st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)
sparsities = st.integers(0, 99).map(lambda percent: percent / 100)


def test_uniform_literal():
    assert sparsity.uniform(SHAPES, 0.4) == {'a': 60, 'b': 12, 'c': 24}
    # 0.5 of 3, 3 and 1 weights: 3.5 in all is rounded to even, and remainders decide.
    assert sparsity.uniform({'a': (3,), 'b': (3,), 'c': (1,)}, 0.5) == {'a': 2, 'b': 2, 'c': 0}


def test_erk_literal():
    # Raw densities 20 / 100 and 4 / 4: the small one fills up, the other gets the rest.
    assert sparsity.erk({'big': (10, 10), 'small': (2, 2)}, 0.5) == {'big': 48, 'small': 4}


@given(shapes_strategy, sparsities)
def test_counts_sum_exactly_to_the_target(shapes, share):
    target = sparsity.target_nonzeros(shapes, share)
    assert abs(target - (1 - share) * sum(map(math.prod, shapes.values()))) <= 0.5 + 1e-9
    for distribution in (sparsity.uniform, sparsity.erk):
        counts = distribution(shapes, share)
        assert sum(counts.values()) == target
        assert list(counts) == list(shapes)
        assert all(0 <= counts[name] <= math.prod(shapes[name]) for name in shapes)


def test_erk_equals_the_reference_within_one_weight():
    golden = json.loads((GOLDEN / 'erk_slak_tiny_s40.json').read_text())
    shapes = {name: tuple(shape) for name, shape in golden['shapes'].items()}
    counts = sparsity.erk(shapes, golden['sparsity'])
    for name, density in golden['densities'].items():
        assert abs(counts[name] - density * math.prod(shapes[name])) <= 1, name


def test_erk_leaves_every_large_kernel_of_slak_dense():
    golden = json.loads((GOLDEN / 'erk_slak_tiny_s40.json').read_text())
    shapes = golden['shapes']
    dense = sparsity.dense_layers(sparsity.erk(shapes, 0.4), shapes)
    kernels = [name for name in shapes if 'large_kernel' in name]
    assert set(kernels) <= set(dense)
    assert (len(dense), len(shapes)) == (67, 95)


def test_from_nonzeros():
    assert sparsity.from_nonzeros({'a': torch.tensor([[0.0, 1.0], [-2.0, 0.0]])}) == {'a': 2}


def test_from_map():
    counts = sparsity.from_map(SHAPES, {'^[ab]$': 0.5, 'a': 0.9, 'b|c': 0.0})
    assert counts == {'a': 10, 'b': 10, 'c': 40}  # the exact name wins, then the first match
    assert sparsity.from_map(SHAPES, {'a': 0.9})['c'] == 40  # not named: dense
    with pytest.raises(ValueError, match="'z' matches none of the 3 tensors"):
        sparsity.from_map(SHAPES, {'z': 0.5})


def test_from_scores_counts_the_global_top():
    scores = {'a': torch.tensor([5.0, 1.0, 4.0]), 'b': torch.tensor([[3.0, 2.0, 0.0]])}
    assert sparsity.from_scores(scores, 0.5) == {'a': 2, 'b': 1}
    assert sparsity.from_scores({'a': torch.ones(3), 'b': torch.ones(3)}, 0.5) == {'a': 3, 'b': 0}


def test_from_scores_makes_nearly_dense_tensors_dense_at_the_others_cost():
    high = torch.full((999,), 9.0)
    scores = {'a': torch.cat([high, torch.tensor([-1.0])]), 'b': torch.rand(1000)}
    plain = sparsity.from_scores(scores, 0.5, dense_from=None)
    promoted = sparsity.from_scores(scores, 0.5)
    assert plain['a'] == 999
    assert promoted['a'] == 1000
    assert sum(plain.values()) == sum(promoted.values()) == 1000


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1), sparsities)
def test_from_scores_sums_exactly(rows, share):
    scores = {str(i): torch.tensor(row, dtype=torch.float32) for i, row in enumerate(rows)}
    counts = sparsity.from_scores(scores, share)
    assert sum(counts.values()) == sparsity.target_nonzeros(
        {name: score.shape for name, score in scores.items()}, share
    )
    assert all(0 <= counts[name] <= scores[name].numel() for name in scores)


@pytest.mark.parametrize('share', [-0.1, 1.0, 1.5])
@pytest.mark.parametrize('distribution', [sparsity.uniform, sparsity.erk])
def test_sparsity_out_of_range(distribution, share):
    with pytest.raises(ValueError, match=r'sparsity must be in \[0, 1\)'):
        distribution(SHAPES, share)


def test_nothing_to_distribute_and_nan():
    with pytest.raises(ValueError, match='no tensor'):
        sparsity.uniform({}, 0.5)
    with pytest.raises(ValueError, match='a: scores contain NaN'):
        sparsity.from_scores({'a': torch.tensor([1.0, float('nan')])}, 0.5)


def test_sparsity_is_the_decimal_that_was_written():
    # 13.5 goes to the even 14; the binary neighbour of 0.1 would give 13.
    assert sparsity.target_nonzeros({'a': (15,)}, 0.1) == 14


def test_from_scores_promotes_nothing_that_nobody_can_pay_for():
    assert sparsity.from_scores({'a': torch.arange(200.0)}, 0.005) == {'a': 199}
