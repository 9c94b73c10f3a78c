import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmslak.sparsity import Masks, UnitGroup, Units, removed_count, unit_scores
from tests.no_waiting import NoWaiting

GROUP = UnitGroup('mlp', (('one.weight', 0), ('one.bias', 0), ('two.weight', 1)))


def tensors() -> dict[str, torch.Tensor]:
    """Three units between two inputs and two outputs: sums of |w| are 6, 0 and 10."""
    return {
        'one.weight': torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.0, 3.0]]),
        'one.bias': torch.tensor([1.0, 0.0, -3.0]),
        'two.weight': torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 4.0]]),
    }


def units(*groups: UnitGroup) -> Units:
    return Units(groups or [GROUP], tensors())


@pytest.mark.parametrize(
    ('method', 'scores'),
    [('umm', [6 / 5, 0, 2]), ('l2', [math.sqrt(10), 0, math.sqrt(34)]), ('gradient', [3, 0, 5])],
)
def test_scores_of_three_units(method, scores):
    """Zeros count in the mean: unit 2 has two of them."""
    gradients = {
        'one.weight': torch.tensor([[1.0, 1.0], [9.0, 9.0], [9.0, 1.0]]),
        'one.bias': torch.tensor([-8.0, 9.0, 2.0]),
        'two.weight': torch.tensor([[2.0, 9.0, 9.0], [9.0, 9.0, 4.0]]),
    }
    found = unit_scores(GROUP, tensors(), method, gradients)
    torch.testing.assert_close(found, torch.tensor(scores, dtype=torch.float32))


def test_scores_of_half_precision_do_not_overflow():
    large = {name: (t * 10_000).to(torch.float16) for name, t in tensors().items()}
    assert unit_scores(GROUP, large, 'l2').isfinite().all()


def test_a_1x1_convolution_has_units_too():
    convolutions = {
        name: t[..., None, None] if t.dim() == 2 else t for name, t in tensors().items()
    }
    assert torch.equal(unit_scores(GROUP, convolutions), unit_scores(GROUP, tensors()))


@pytest.mark.parametrize(
    ('change', 'method', 'message'),
    [
        ({'two.weight': torch.ones(2, 4)}, 'umm', "different numbers of units: .*'two.weight': 4"),
        ({'one.bias': torch.full((3,), math.nan)}, 'umm', 'mlp: scores of hidden units'),
        ({}, 'median', "unknown score 'median', known: umm, l2, gradient"),
        ({}, 'gradient', "one.weight: score 'gradient' needs its gradient"),
    ],
)
def test_scores_that_cannot_be_told(change, method, message):
    with pytest.raises(ValueError, match=message):
        unit_scores(GROUP, tensors() | change, method)


def test_a_missing_tensor_is_named():
    with pytest.raises(ValueError, match=r'mlp: no tensor two.weight'):
        Units([GROUP], {k: v for k, v in tensors().items() if k != 'two.weight'})


@pytest.mark.parametrize(
    ('number', 'share', 'progress', 'count'),
    [
        (10, 0.4, 1.0, 4),
        (10, 0.4, 2.0, 4),
        (10, 0.4, 0.0, 0),
        (1000, 0.4, 0.5, 350),  # 0.4 · (1 - 1/8)
        (10, 0.07, 1.0, 1),
        (100, 0.07, 1.0, 7),
        (3, 0.99, 1.0, 2),  # one stays
        (1, 0.5, 1.0, 0),
    ],
)
def test_removed_counts(number, share, progress, count):
    assert removed_count(number, share, progress) == count


@given(st.integers(1, 500), st.floats(0, 0.999), st.lists(st.floats(0, 1), max_size=5))
def test_the_schedule_never_goes_back(number, share, moments):
    counts = [removed_count(number, share, moment) for moment in sorted(moments)]
    assert counts == sorted(counts)
    assert all(0 <= count < number for count in counts)


@pytest.mark.parametrize('share', [-0.1, 1, 1.5])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=r'share must be in \[0, 1\)'):
        removed_count(10, share)


def test_the_emptiest_go_first_and_stay_away():
    u = units()
    assert u.remove({'mlp': unit_scores(GROUP, tensors())}, {'mlp': 1}) == 1
    assert u.alive['mlp'].tolist() == [True, False, True]
    # The highest score of all does not bring a unit back.
    assert u.remove({'mlp': torch.tensor([2.0, 9.0, 3.0])}, {'mlp': 2}) == 1
    assert u.alive['mlp'].tolist() == [False, False, True]
    assert u.remove({'mlp': torch.zeros(3)}, {'mlp': 1}) == 0
    assert u.counts == {'mlp': 1}


def test_equal_scores_go_by_their_index():
    u = units()
    u.remove({'mlp': torch.ones(3)}, {'mlp': 2})
    assert u.alive['mlp'].tolist() == [False, False, True]


def test_nothing_changes_after_an_error():
    other = UnitGroup('other', GROUP.entries)
    u = units(GROUP, other)
    with pytest.raises(ValueError, match=r'other: .*NaN'):
        u.remove(
            {'mlp': torch.ones(3), 'other': torch.full((3,), math.nan)}, {'mlp': 1, 'other': 1}
        )
    assert u.counts == {'mlp': 3, 'other': 3}


@given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 39))
def test_moving_keeps_the_number_of_units(seed, rate, gone):
    group = UnitGroup('mlp', (('w', 0),))
    u = Units([group], {'w': torch.ones(40, 2)})
    generator = torch.Generator().manual_seed(seed)
    u.remove({'mlp': torch.rand(40, generator=generator)}, {'mlp': gone})
    before = u.alive['mlp'].clone()
    grown = u.move({'mlp': torch.rand(40, generator=generator)}, rate, seed)
    assert u.counts == {'mlp': 40 - gone}
    assert torch.equal(grown['mlp'], u.alive['mlp'] & ~before)
    if rate == 0:
        assert not grown['mlp'].any()


def test_every_move_draws_anew():
    group = UnitGroup('mlp', (('w', 0),))
    scores = {'mlp': torch.arange(100.0)}
    found = []
    for _ in range(2):
        u = Units([group], {'w': torch.ones(100, 2)})
        u.remove(scores, {'mlp': 50})
        found.append([u.move(scores, 0.5, 7)['mlp'].tolist() for _ in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_positions_and_zeros_of_units():
    u, t = units(), tensors()
    u.remove({'mlp': torch.tensor([0.0, 1.0, 2.0])}, {'mlp': 1})
    allowed = u.allowed(t)
    assert allowed['one.weight'].tolist() == [[False, False], [True, True], [True, True]]
    assert allowed['one.bias'].tolist() == [False, True, True]
    assert allowed['two.weight'].tolist() == [[False, True, True]] * 2
    u.apply_(t)
    assert t['one.weight'].tolist() == [[0, 0], [0, 0], [0, 3]]
    assert t['one.bias'].tolist() == [0, 0, -3]
    assert t['two.weight'].tolist() == [[0, 0, 0], [0, 0, 4]]


@pytest.mark.parametrize('change', ['remove', 'move', 'set', 'load', 'to'])
def test_zeroing_units_waits_for_nothing_however_they_changed(change):
    u, scores = units(), {'mlp': torch.tensor([0.0, 1.0, 2.0])}
    if change == 'load':
        other = units()
        other.remove(scores, {'mlp': 1})
        u.load_state_dict(other.state_dict())
    elif change == 'set':
        u.set_alive_({'mlp': torch.tensor([0, 1, 1], dtype=torch.uint8)})
    else:
        u.remove(scores, {'mlp': 1})
    if change == 'move':
        u.move({'mlp': torch.tensor([0.0, 0.0, 1.0])}, 0.5, 0)
    u = u.to('cpu') if change == 'to' else u
    t = {name: torch.ones_like(tensor) for name, tensor in tensors().items()}
    with NoWaiting():
        u.apply_(t)
    assert u.counts == {'mlp': 2}
    assert torch.equal(t['one.bias'], u.alive['mlp'].float())
    assert torch.equal(t['two.weight'], u.alive['mlp'].float().expand(2, 3))


@pytest.mark.parametrize(
    'wait',
    [
        lambda t: t.nonzero(),
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: t.__setitem__(t > 0, torch.ones(3)),
    ],
)
def test_what_waits_is_seen(wait):
    t = torch.ones(3)
    with pytest.raises(AssertionError, match='makes the host wait'), NoWaiting():
        wait(t)


def test_a_tensor_between_two_hidden_layers_needs_both():
    first = UnitGroup('first', (('a', 0), ('b', 1)))
    second = UnitGroup('second', (('b', 0), ('c', 1)))
    t = {'a': torch.ones(2, 3), 'b': torch.ones(2, 2), 'c': torch.ones(3, 2)}
    u = Units([first, second], t)
    u.remove(
        {'first': torch.tensor([0.0, 1.0]), 'second': torch.tensor([1.0, 0.0])},
        {'first': 1, 'second': 1},
    )
    assert u.allowed(t)['b'].tolist() == [[False, True], [False, False]]


def test_the_state_comes_back():
    u = units()
    u.remove({'mlp': torch.tensor([2.0, 0.0, 1.0])}, {'mlp': 1})
    u.updates = 3
    file = io.BytesIO()
    torch.save(u.state_dict(), file)
    file.seek(0)
    other = units()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.alive['mlp'].tolist() == [True, False, True]
    assert other.updates == 3


@pytest.mark.parametrize(
    ('alive', 'message'),
    [
        (
            {'mlp': torch.ones(4, dtype=torch.bool)},
            'mlp: 4 hidden units were saved, the model has 3',
        ),
        ({'head': torch.ones(3, dtype=torch.bool)}, r"of \['head'\], not of \['mlp'\]"),
    ],
)
def test_a_state_of_another_model(alive, message):
    with pytest.raises(ValueError, match=message):
        units().load_state_dict({'updates': 0, 'alive': alive})


# ---------------------------------------------------------------- masks within units


def test_weights_of_lost_units_grow_in_the_rest():
    masks = Masks({'one.weight': torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()})
    allowed = {'one.weight': torch.tensor([[0, 0], [1, 1], [1, 1]]).bool()}
    assert masks.confine_(allowed, 0, 1) == 0
    assert masks.nnz == {'one.weight': 3}
    assert masks.active['one.weight'][0].tolist() == [False, False]
    assert masks.active['one.weight'][1, 0]


def test_what_has_no_room_grows_elsewhere_in_proportion():
    full = torch.ones(4, 4, dtype=torch.bool)
    masks = Masks({'a': full, 'b': torch.zeros(2, 4).bool(), 'c': torch.zeros(6, 4).bool()})
    half = torch.zeros(4, 4, dtype=torch.bool)
    half[:2] = True
    assert masks.confine_({'a': half}, 0, 1) == 0
    assert masks.nnz == {'a': 8, 'b': 2, 'c': 6}
    assert torch.equal(masks.active['a'], half)


def test_where_nothing_has_room_the_count_falls():
    masks = Masks({'a': torch.ones(4, 4).bool(), 'b': torch.tensor([True, False])})
    half = torch.zeros(4, 4, dtype=torch.bool)
    half[:2] = True
    assert masks.confine_({'a': half}, 0, 1) == 7
    assert masks.nnz == {'a': 8, 'b': 2}


@given(st.integers(0, 99), st.integers(0, 96), st.integers(0, 11))
def test_confined_masks_keep_their_count(seed, count, gone):
    shapes = {'a': (12, 8), 'b': (5, 5)}
    masks = Masks.random(shapes, {'a': count, 'b': 10}, seed)
    group = UnitGroup('a', (('a', 0),))
    u = Units([group], masks.active)
    u.remove({'a': torch.arange(12.0)}, {'a': gone})
    allowed = u.allowed(masks.active)
    before = sum(masks.nnz.values())
    kept = masks.active['a'] & allowed['a']
    missing = masks.confine_(allowed, seed, 1)
    assert sum(masks.nnz.values()) == before - missing
    assert not (masks.active['a'] & ~allowed['a']).any()
    assert not (kept & ~masks.active['a']).any()
    assert (missing > 0) == (before > (12 - gone) * 8 + 25)
    assert not (masks.active['a'] & ~masks.ever['a']).any()


@given(st.integers(0, 99), st.sampled_from([0.1, 0.5, 1.0]))
def test_updates_stay_within_what_is_allowed(seed, rate):
    masks = Masks.random({'a': (12, 8)}, {'a': 40}, seed)
    u = Units([UnitGroup('a', (('a', 0),))], masks.active)
    u.remove({'a': torch.arange(12.0)}, {'a': 5})
    allowed = u.allowed(masks.active)
    masks.confine_(allowed, seed, 0)
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) * masks.active['a']
    masks.update({'a': weight}, rate, seed=seed, allowed=allowed)
    assert masks.nnz == {'a': 40}
    assert not masks.active['a'][:5].any()
