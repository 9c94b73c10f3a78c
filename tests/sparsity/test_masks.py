import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmslak.sparsity import Masks

SHAPES = {'a': (5, 7), 'b': (3, 1, 51, 5), 'c': (1,)}
COUNTS = {'a': 20, 'b': 300, 'c': 1}


def masks(seed=0) -> Masks:
    return Masks.random(SHAPES, COUNTS, seed)


def weights(seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_random_masks_have_exact_counts_and_depend_on_the_seed():
    assert masks().nnz == COUNTS
    assert torch.equal(masks().active['b'], masks().active['b'])
    assert not torch.equal(masks().active['b'], masks(1).active['b'])


def test_numbers():
    m = Masks({'a': torch.tensor([True, False, False, True]), 'b': torch.ones(4, dtype=torch.bool)})
    assert m.nnz == {'a': 2, 'b': 4}
    assert m.densities == {'a': 0.5, 'b': 1.0}
    assert m.density == m.exploration_rate == 0.75


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_apply_zeroes_off_the_mask_and_nothing_else(dtype):
    m = masks()
    before = {name: w.to(dtype) for name, w in weights().items()}
    after = {name: w.clone() for name, w in before.items()}
    m.apply_(after)
    for name, mask in m.active.items():
        assert not after[name][~mask].any()
        assert torch.equal(after[name][mask], before[name][mask])


@given(
    st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99), st.sampled_from(['magnitude', 'set'])
)
def test_update_conserves_every_count(rate, seed, drop):
    m, w = masks(), weights(seed)
    m.apply_(w)
    old = {name: mask.clone() for name, mask in m.active.items()}
    update = m.update(w, rate, seed=seed, drop=drop)
    assert m.nnz == COUNTS
    for name in SHAPES:
        grown = update.grown[name]
        assert torch.equal(grown, m.active[name] & ~old[name])
        assert not (m.active[name] & ~m.ever[name]).any()
        assert not (old[name] & ~m.ever[name]).any()
    replaced = sum(int(g.sum()) for g in update.grown.values())
    assert update.churn == replaced / sum(COUNTS.values())
    assert m.updates == 1


def test_update_literal():
    m = Masks({'w': torch.tensor([True, True, True, False, False])})
    w = {'w': torch.tensor([0.1, 5.0, 3.0, 0.0, 0.0])}
    update = m.update(w, 1 / 3, scores={'w': torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0])})
    assert m.active['w'].tolist() == [False, True, True, False, True]
    assert update.grown['w'].tolist() == [False, False, False, False, True]
    assert update.churn == pytest.approx(1 / 3)
    assert m.exploration_rate == 0.8


def test_updates_are_the_same_whatever_the_global_generator_holds():
    first, second = masks(), masks()
    for m in (first, second):
        torch.manual_seed(id(m) % 1000)
        w = weights()
        m.apply_(w)
        m.update(w, 0.5)
    assert all(torch.equal(first.active[n], second.active[n]) for n in SHAPES)


def test_a_failed_update_changes_nothing():
    m, w = masks(), weights()
    m.apply_(w)
    old = m.state_dict()
    w['c'] = torch.full((1,), float('nan'))
    with pytest.raises(ValueError, match='c: cannot rank'):
        m.update(w, 0.5)
    assert all(torch.equal(old['active'][n], m.state_dict()['active'][n]) for n in SHAPES)
    assert m.updates == 0


def test_state_dict_is_packed_safe_and_complete():
    m, w = masks(), weights()
    m.apply_(w)
    m.update(w, 0.5)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    assert m.state_dict()['active']['b'].numel() == (3 * 51 * 5 + 7) // 8
    file.seek(0)
    other = Masks.dense(SHAPES)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name in SHAPES:
        assert torch.equal(m.active[name], other.active[name])
        assert torch.equal(m.ever[name], other.ever[name])
    assert other.updates == 1


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4))
def test_packing_round_trip(rows):
    m = Masks({str(i): torch.tensor(row) for i, row in enumerate(rows)})
    other = Masks.dense({name: mask.shape for name, mask in m.active.items()})
    other.unpack_(m.packed())
    assert all(torch.equal(m.active[n], other.active[n]) for n in m.active)


def edit(key, value):
    state = masks().state_dict()
    state[key] = value(state[key])
    return state


@pytest.mark.parametrize(
    ('state', 'message'),
    [
        ({'updates': 1}, 'not a mask state: active, ever, shapes missing'),
        (edit('active', lambda d: {k: d[k] for k in 'ab'}), "1 missing in 'active'"),
        (edit('shapes', lambda d: {**d, 'z': [1]}), r"1 unknown \['z'\]"),
        (edit('shapes', lambda d: {**d, 'a': [7, 5]}), r'a: saved mask has shape \(7, 5\)'),
        (edit('ever', lambda d: {**d, 'a': d['a'][:2]}), "a: 'ever' has the wrong number of bytes"),
    ],
)
def test_states_that_do_not_fit(state, message):
    m = masks()
    with pytest.raises(ValueError, match=message):
        m.load_state_dict(state)
    assert m.nnz == COUNTS


def test_wrong_tensors_are_named():
    m, w = masks(), weights()
    with pytest.raises(ValueError, match='c: masked, but no such tensor'):
        m.apply_({k: w[k] for k in 'ab'})
    with pytest.raises(ValueError, match=r'a: mask has shape \(5, 7\), the tensor \(7, 5\)'):
        m.apply_({**w, 'a': w['a'].T})
    with pytest.raises(ValueError, match='mask must be bool'):
        Masks({'a': torch.ones(2)})
    with pytest.raises(ValueError, match='packed masks must be'):
        m.unpack_(torch.zeros(3, dtype=torch.uint8))


def test_every_draw_has_its_own_random_numbers():
    m, w = masks(seed=0), weights()
    # Everything is dropped: with the numbers of the initial draw, the same mask would grow again.
    drawn = m.active['b'].clone()
    m.update(w, 1.0, seed=0)
    first = m.active['b'].clone()
    m.update(w, 1.0, seed=0)
    second = m.active['b'].clone()
    other = masks(seed=0)
    other.update(w, 1.0, seed=1)
    for a, b in [(drawn, first), (first, second), (first, other.active['b'])]:
        assert not torch.equal(a, b)


def test_update_of_some_tensors_leaves_the_others():
    m, w = masks(), weights()
    old = {name: mask.clone() for name, mask in m.active.items()}
    update = m.update(w, 0.5, names=['a'])
    assert list(update.grown) == ['a']
    assert not torch.equal(m.active['a'], old['a'])
    assert torch.equal(m.active['b'], old['b'])
    assert update.churn == int(update.grown['a'].sum()) / COUNTS['a']
    with pytest.raises(ValueError, match='z: no such mask'):
        m.update(w, 0.5, names=['z'])
    with pytest.raises(ValueError, match='b: masked, but no such tensor'):
        m.update(w, 0.5, scores={'a': w['a']})


def test_apply_to_parameters_keeps_them_leaves():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    Masks({'w': torch.tensor([True, False])}).apply_({'w': parameter, 'bias': torch.ones(1)})
    assert parameter.tolist() == [1.0, 0.0]
    assert parameter.is_leaf
    assert parameter.requires_grad


def test_from_nonzeros():
    m = Masks.from_nonzeros({'w': torch.tensor([[-1.0, 0.0], [-0.0, 2.0]])})
    assert m.active['w'].tolist() == [[True, False], [False, True]]


def test_from_scores_keeps_the_highest():
    m = Masks.from_scores({'w': torch.tensor([3.0, 1.0, 2.0, 3.0])}, {'w': 2})
    assert m.active['w'].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match='w: cannot grow 5 weights in 4'):
        Masks.from_scores({'w': torch.ones(4)}, {'w': 5})


def test_masks_are_copies():
    mask = torch.tensor([True, False])
    m = Masks({'w': mask})
    mask.fill_(True)
    m.ever['w'].fill_(True)
    assert m.active['w'].tolist() == [True, False]


def test_unpacked_masks_join_the_history():
    m = Masks({'w': torch.tensor([True, False, False])})
    m.unpack_(Masks({'w': torch.tensor([False, True, False])}).packed())
    assert m.active['w'].tolist() == [False, True, False]
    assert m.ever['w'].tolist() == [True, True, False]


def test_to_moves_the_history_too():
    m = masks()
    assert m.to('meta') is m
    assert {mask.device.type for mask in (*m.active.values(), *m.ever.values())} == {'meta'}
