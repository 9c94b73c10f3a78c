"""SparseTrainingHook with hidden units that go or move, and with n:m sparsity."""

import json
import signal
from itertools import pairwise

import pytest
import torch
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import nn

from mmslak.engine import SparseTrainingError, SparseTrainingHook
from mmslak.sparsity import is_n_m
from tests import forks, toy
from tests.no_waiting import NoWaiting
from tests.toy import (
    ADAMW,
    KEPT,
    SGD,
    Toy,
    assert_same,
    build_runner,
    hook_of,
    load,
    parameters,
    records,
    start,
    train,
)

PAIRS = {'mix': 'head'}  # the 16 channels of the toy's 1×1 convolution are its hidden units
NEURON = dict(
    update_interval=2,
    prune_rate=0.3,
    structure=dict(type='neuron', share=0.5, until=0.75, pairs=PAIRS),
)
MOVING = dict(NEURON, structure=dict(type='neuron', share=0.5, moving=True, pairs=PAIRS))
N_M = dict(update_interval=2, prune_rate=0.3, structure=dict(type='n:m', n=2, m=4))
STATE = ('state_dict', 'ema_state_dict', 'optimizer', 'sparse_training')


def dead_units(weights: dict) -> torch.Tensor:
    """Units of the toy of which every entry is zero."""
    entries = [
        weights['mix.weight'].flatten(1),
        weights['mix.bias'][:, None],
        weights['head.weight'].T,
    ]
    return ~torch.cat(entries, 1).bool().any(1)


def units_of(runner) -> torch.Tensor:
    return hook_of(runner)._neurons.units.alive['mix']


@pytest.mark.parametrize('optimizer', [SGD, ADAMW], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('score', ['umm', 'l2', 'gradient'])
def test_units_go_step_by_step_and_the_count_of_weights_stays(tmp_path, optimizer, score):
    sparse = dict(NEURON, structure=dict(NEURON['structure'], score=score))
    runner = train(tmp_path, sparse, iters=16, optimizer=optimizer, ema=True)
    gone = [int(dead_units(r['weights']).sum()) for r in records(runner)]
    # Updates after 2, 4, … 12 of 16 steps: 8 · (1 - (1 - t/12)³), to the nearest.
    assert gone[1:12:2] == [3, 6, 7, 8, 8, 8]
    assert gone == sorted(gone)
    assert gone[-1] == int((~units_of(runner)).sum()) == 8
    for before, after in pairwise(records(runner)):
        assert not (dead_units(before['weights']) & ~dead_units(after['weights'])).any()
    for record in records(runner):
        assert sum(int(mask.sum()) for mask in record['masks'].values()) == KEPT
        for name, mask in record['masks'].items():
            assert not record['weights'][name][~mask].any()
            assert not record['ema'][name][~mask].any()
        dead = dead_units(record['weights'])
        assert not record['ema']['mix.bias'][dead].any()
        for key, value in record['state']['mix.bias'].items():
            if value.shape == dead.shape:
                assert not value[dead].any(), key
        for value in record['state']['head.weight'].values():
            if value.dim() == 2:
                assert not value[:, dead].any()


def test_the_emptiest_units_go(tmp_path):
    """The weights of four units are tiny from the start."""
    torch.manual_seed(0)
    model = Toy()
    with torch.no_grad():
        model.mix.weight[[1, 5, 6, 11]] *= 1e-4
        model.mix.bias[[1, 5, 6, 11]] = 0
        model.head.weight[:, [1, 5, 6, 11]] *= 1e-4
    structure = dict(NEURON['structure'], share=0.25)
    still = dict(type='SGD', lr=1e-9)
    runner = train(tmp_path, dict(NEURON, structure=structure), model=model, optimizer=still)
    assert (~units_of(runner)).nonzero().flatten().tolist() == [1, 5, 6, 11]


def test_units_that_move(tmp_path):
    runner = train(tmp_path, MOVING, iters=16)
    moments = [start(runner), *records(runner)]
    alive = [~dead_units(moment['weights']) for moment in moments]
    assert [int(a.sum()) for a in alive] == [8] * 17
    assert any(not torch.equal(a, b) for a, b in pairwise(alive))
    assert [i for i in range(1, 17) if not torch.equal(alive[i], alive[i - 1])] != list(
        range(1, 17)
    )
    for moment in moments:
        assert sum(int(mask.sum()) for mask in moment['masks'].values()) == KEPT
        for name, mask in moment['masks'].items():
            assert not moment['weights'][name][~mask].any()


def test_units_that_come_back_change_no_output_and_learn(tmp_path):
    runner = train(tmp_path, MOVING, iters=16)
    came_back = 0
    moments = [start(runner), *records(runner)]
    for before, after, later in zip(moments, moments[1:], moments[2:]):
        new = dead_units(before['weights']) & ~dead_units(after['weights'])
        if new.any():
            came_back += int(new.sum())
            assert after['weights']['mix.weight'][new].any(1).all()
            assert not after['weights']['head.weight'][:, new].any()
            alive = ~dead_units(later['weights']) & new
            active = later['masks']['head.weight'][:, alive].any(0)
            assert later['weights']['head.weight'][:, alive].any(0)[active].all()
    assert came_back > 0


def test_more_units_than_zeros_lower_the_count(tmp_path):
    """With all weights active there is no room: the count falls, and the log says so."""
    runner = train(tmp_path, dict(NEURON, sparsity=0.0, init='uniform'), iters=16)
    last = records(runner)[-1]['masks']
    # 8 of 16 rows of 8, 8 of 16 columns of 4.
    assert sum(int(mask.sum()) for mask in last.values()) == 624 - 64 - 32
    (log,) = tmp_path.rglob('*.log')
    assert 'no room for 96 weights' in log.read_text()


@pytest.mark.parametrize('saved', [5, 6, 7], ids=['before', 'right-after', 'after'])
@pytest.mark.parametrize('sparse', [NEURON, MOVING, N_M], ids=['neuron', 'moving', '2:4'])
def test_resumed_runs_end_the_same_to_the_bit(tmp_path, sparse, saved):
    options = dict(optimizer=ADAMW, ema=True, iters=16, save_every=1)
    whole = train(tmp_path / 'whole', sparse, **options)
    checkpoint = str(tmp_path / f'whole/iter_{saved}.pth')
    resumed = train(tmp_path / 'resumed', sparse, load_from=checkpoint, resume=True, **options)
    for one, other in zip(records(resumed), records(whole)[saved:], strict=True):
        assert_same(one, other)
    for key in STATE:
        assert_same(load(tmp_path / 'resumed', 16)[key], load(tmp_path / 'whole', 16)[key], key)


def test_killed_in_the_middle_of_the_removal_and_resumed(tmp_path):
    options = dict(sparse=NEURON, optimizer=ADAMW, ema=True, iters=16, save_every=3)
    runs = json.dumps([dict(options, kill_after=6)])
    ended = forks.run(toy.main, str(tmp_path), runs)
    assert ended.statuses == [-signal.SIGKILL], ended.output[-2000:]
    whole = train(tmp_path / 'whole', **options)
    assert 0 < int(dead_units(records(whole)[5]['weights']).sum()) < 8
    train(tmp_path / '0', **options, resume=True)
    for key in STATE:
        assert_same(load(tmp_path / '0', 16)[key], load(tmp_path / 'whole', 16)[key], key)


ONE_OF_FOUR = dict(update_interval=2, structure=dict(type='n:m', n=1, m=4))
HEAD = dict(update_interval=2, include='^head')


@pytest.mark.parametrize(
    ('saved', 'asked', 'names'),
    [
        (ONE_OF_FOUR, N_M, ("'1:4'", "'2:4'")),
        (N_M, ONE_OF_FOUR, ("'2:4'", "'1:4'")),
        (N_M, dict(N_M, structure=dict(type='n:m', n=4, m=8)), ("'2:4'", "'4:8'")),
        (N_M, HEAD, ("'2:4'", "'weight'")),
        (HEAD, N_M, ("'weight'", "'2:4'")),
        (dict(update_interval=2), NEURON, ("'weight'", "'neuron'")),
        (NEURON, dict(update_interval=2), ("'neuron'", "'weight'")),
    ],
)
def test_zeros_of_another_kind_are_an_error(tmp_path, saved, asked, names):
    train(tmp_path / 'first', saved, iters=4)
    checkpoint = str(tmp_path / 'first/iter_4.pth')
    runner = build_runner(tmp_path / 'second', asked, load_from=checkpoint, resume=True)
    message = 'they are of structure {}, the config asks for {}'.format(*names)
    with pytest.raises(SparseTrainingError, match=message):
        runner.train()
    assert runner.iter == 4


@pytest.mark.parametrize(
    ('saved', 'asked', 'message'),
    [
        (ONE_OF_FOUR, N_M, 'the zeros of head.weight are not 2:4: some 4 neighbours have not 2'),
        (dict(update_interval=2), NEURON, r"trained without structure=dict.type='neuron'"),
    ],
)
def test_older_files_do_not_say_the_structure(tmp_path, saved, asked, message):
    train(tmp_path / 'first', saved, iters=4)
    checkpoint = load(tmp_path / 'first', 4)
    del checkpoint['sparse_training']['structure']
    torch.save(checkpoint, tmp_path / 'older.pth')
    older = str(tmp_path / 'older.pth')
    runner = build_runner(tmp_path / 'second', asked, load_from=older, resume=True)
    with pytest.raises(SparseTrainingError, match=message):
        runner.train()


def test_units_from_weights_when_the_checkpoint_has_none(tmp_path):
    whole = train(tmp_path / 'whole', NEURON, iters=16, save_every=13)
    checkpoint = load(tmp_path / 'whole', 13)
    del checkpoint['sparse_training']
    torch.save(checkpoint, tmp_path / 'edited.pth')
    sparse = dict(NEURON, resume_fallback='from_weights')
    resumed = train(
        tmp_path / 'resumed', sparse, iters=16, load_from=str(tmp_path / 'edited.pth'), resume=True
    )
    assert torch.equal(units_of(resumed), units_of(whole))


def test_accumulation_counts_steps(tmp_path):
    runner = train(tmp_path, NEURON, iters=32, wrapper=dict(accumulative_counts=2))
    gone = [int(dead_units(r['weights']).sum()) for r in records(runner)]
    assert gone[3:24:4] == [3, 6, 7, 8, 8, 8]
    assert gone[2] == 0


@pytest.mark.parametrize('sparse', [NEURON, MOVING], ids=['neuron', 'moving'])
def test_amp(tmp_path, monkeypatch, sparse):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')
    runner = train(tmp_path, sparse, iters=16, wrapper=wrapper)
    assert int(dead_units(dict(parameters(runner))).sum()) == 8
    assert sum(int(mask.sum()) for mask in records(runner)[-1]['masks'].values()) == KEPT


@pytest.mark.parametrize('grown_state', ['keep', 'mask'])
@pytest.mark.parametrize(
    'sparse', [NEURON, MOVING, N_M, {}], ids=['neuron', 'moving', '2:4', 'weight']
)
def test_steps_without_an_update_wait_for_nothing(tmp_path, monkeypatch, sparse, grown_state):
    """A GPU would stand still for each number that the host reads."""
    watched = []

    def watch(name: str, is_update) -> None:
        original = getattr(SparseTrainingHook, name)

        def method(self, *args, **kwargs):
            if is_update(self):
                return original(self, *args, **kwargs)
            watched.append(name)
            with NoWaiting():
                return original(self, *args, **kwargs)

        monkeypatch.setattr(SparseTrainingHook, name, method)

    watch('_before_step', lambda hook: hook._due(hook.step + 1))
    watch('_after_step', lambda hook: hook._due(hook.step + 1))
    watch('after_train_iter', lambda hook: hook._update is not None)
    settings = dict(update_interval=3) | sparse | dict(update_interval=3, grown_state=grown_state)
    train(tmp_path, settings, iters=16, optimizer=ADAMW, ema=True)
    assert [watched.count(name) for name in dict.fromkeys(watched)] == [11] * 3


def test_finetuning_holds_units_that_are_gone(tmp_path):
    """Their biases, too, though no mask is on them."""
    train(tmp_path / 'first', NEURON, iters=16)
    weights = load(tmp_path / 'first', 16)['state_dict']
    dead = dead_units(weights)
    assert int(dead.sum()) == 8
    settings = dict(preset='finetune', include='')
    second = train(
        tmp_path / 'second',
        settings,
        load_from=str(tmp_path / 'first/iter_16.pth'),
        optimizer=ADAMW,
    )
    for record in records(second):
        assert dead_units(record['weights'])[dead].all()
        for name, mask in record['masks'].items():
            assert torch.equal(mask, weights[name] != 0)


def test_sparse_updates_without_structure_are_as_before(tmp_path):
    one = train(tmp_path / 'one', dict(update_interval=2))
    other = train(tmp_path / 'other', dict(update_interval=2, structure='weight'))
    assert_same(records(one), records(other))
    assert 'units' not in load(tmp_path / 'one', 8)['sparse_training']


# ---------------------------------------------------------------- n:m


@pytest.mark.parametrize('init', ['snip', 'uniform'])
@pytest.mark.parametrize('grow', ['random', 'gradient', 'momentum'])
def test_groups_of_linear_layers_keep_n_of_m(tmp_path, init, grow):
    runner = train(tmp_path, dict(N_M, init=init, grow=grow), iters=8)
    assert list(start(runner)['masks']) == ['head.weight']  # the only linear layer
    masks = [r['masks']['head.weight'] for r in [start(runner), *records(runner)]]
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks)
    assert any(not torch.equal(one, other) for one, other in pairwise(masks))
    weight = runner.model.head.weight
    assert is_n_m(weight, 2, 4)
    assert not weight[~masks[-1]].any()


def test_n_m_from_weights(tmp_path):
    train(tmp_path / 'first', N_M, iters=8)
    settings = dict(N_M, init='from_weights', update_interval=0)
    checkpoint = str(tmp_path / 'first/iter_8.pth')
    second = train(tmp_path / 'second', settings, iters=2, load_from=checkpoint)
    expected = load(tmp_path / 'first', 8)['state_dict']['head.weight'] != 0
    assert torch.equal(start(second)['masks']['head.weight'], expected)
    with pytest.raises(SparseTrainingError, match=r'zeros of head.weight are not 2:4'):
        train(tmp_path / 'third', settings, iters=2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(structure='units'), "unknown structure 'units'"),
        (dict(structure=dict(type='neuron', share=1)), r'structure.share: .* \(0, 1\), got 1'),
        (dict(structure=dict(type='neuron', until=0)), r'structure.until: .* \(0, 1\], got 0'),
        (dict(structure=dict(type='neuron', score='max')), "unknown structure.score 'max'"),
        (dict(structure=dict(type='neuron', n=2)), "'neuron' takes no 'n'"),
        (dict(structure=dict(type='neuron'), update_interval=0), 'update_interval cannot be 0'),
        (dict(structure=dict(type='n:m', n=4, m=4)), 'integers 0 < n < m, got n=4, m=4'),
        (dict(structure=dict(type='n:m'), init='erk'), "init='erk' does not suit it"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseTrainingHook(**settings)


def test_a_model_without_hidden_layers(tmp_path):
    structure = dict(type='neuron')
    runner = build_runner(tmp_path, dict(NEURON, structure=structure))
    with pytest.raises(
        SparseTrainingError, match=r'structure: Toy has no hidden units that are found by name'
    ):
        runner.train()


def test_layers_that_do_not_meet(tmp_path):
    structure = dict(type='neuron', pairs={'stem': 'head'})
    runner = build_runner(tmp_path, dict(NEURON, structure=structure))
    with pytest.raises(SparseTrainingError, match=r'structure: .*stem'):
        runner.train()


def test_units_that_are_read_elsewhere_too(tmp_path):
    """A residual on the hidden side: numbers tell, since names do not."""

    class Residual(Toy):
        def forward(self, x, y, mode='tensor'):
            hidden = torch.relu(self.mix(self.norm(self.strip(self.stem(x))))).mean((2, 3))
            logits = self.head(hidden) + hidden[:, :4]
            return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits

    runner = build_runner(tmp_path, NEURON, model=Residual())
    with pytest.raises(SparseTrainingError, match=r'mix and head: the units are read elsewhere'):
        runner.train()


def test_a_run_that_is_too_short_for_units_to_go(tmp_path):
    runner = build_runner(tmp_path, dict(NEURON, update_interval=8), iters=8)
    with pytest.raises(SparseTrainingError, match=r'no update in the first 6 optimizer steps'):
        runner.train()


def test_layers_that_are_left_alone(tmp_path):
    """A hidden layer of which nothing is masked keeps its units."""
    sparse = dict(NEURON, exclude=['mix', 'head'])
    with pytest.raises(
        SparseTrainingError, match=r'no weight of the hidden layers .mix, …. is masked'
    ):
        build_runner(tmp_path, sparse).train()


def test_dense_weights_are_no_n_m_to_resume(tmp_path):
    train(tmp_path / 'first', iters=4)
    checkpoint = str(tmp_path / 'first/iter_4.pth')
    sparse = dict(N_M, resume_fallback='from_weights')
    with pytest.raises(SparseTrainingError, match=r'zeros of head.weight are not 2:4'):
        train(tmp_path / 'second', sparse, load_from=checkpoint, resume=True)


def test_a_model_without_layers_for_n_m(tmp_path):
    structure = dict(type='n:m', n=2, m=32)
    with pytest.raises(SparseTrainingError, match=r'nn.Linear whose inputs are a multiple of 32'):
        train(tmp_path, dict(N_M, structure=structure))
