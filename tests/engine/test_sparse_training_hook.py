"""SparseTrainingHook in MMEngine's own training loop: what stays zero, what moves, and when."""

import functools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.utils import digit_version
from torch import Tensor, nn

from mmslak import sparsity
from mmslak.engine import SparseTrainingError, SparseTrainingHook, snip
from mmslak.engine.sparse_training_hook import DEFAULTS, PRESETS
from mmslak.models import SLaK
from tests.golden import GOLDEN, slak_options
from tests.toy import (
    ADAMW,
    KEPT,
    SGD,
    SHAPES,
    WEIGHTS,
    Data,
    RepeatedBatches,
    Toy,
    assert_same,
    build_runner,
    copies,
    hook_of,
    load,
    parameters,
    records,
    start,
    train,
)

OPTIMIZERS = {
    'sgd': dict(SGD, foreach=False),
    'sgd-foreach': dict(SGD, weight_decay=0.01, foreach=True),
    'sgd-fused': dict(SGD, fused=True),
    'adamw': dict(ADAMW, foreach=False),
    'adamw-foreach': dict(ADAMW, foreach=True),
    'adamw-fused': dict(ADAMW, fused=True),
}
ACTIVE = dict(update_interval=2, prune_rate=0.3)


@pytest.fixture
def _amp_on_cpu(monkeypatch):
    """Lets AmpOptimWrapper be built: it asks for an accelerator that autocast does not need."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)


def skip_without(optimizer: dict) -> None:
    """Skips where this torch has no such optimizer on the CPU."""
    options = {k: v for k, v in optimizer.items() if k != 'type'}
    try:
        getattr(torch.optim, optimizer['type'])([nn.Parameter(torch.zeros(1))], **options)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f'torch {torch.__version__}: {error}')


def nonzeros(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}


def changed_at(runner) -> list[int]:
    """Iterations, from 1, after which the masks are not those of the iteration before."""
    masks = [start(runner)['masks'], *(r['masks'] for r in records(runner))]
    return [
        i
        for i in range(1, len(masks))
        if any(not torch.equal(masks[i][name], masks[i - 1][name]) for name in masks[i])
    ]


def assert_exactly_sparse(runner) -> None:
    """Zeros where the masks are, and as many non-zeros per tensor as at the start, at all times."""
    moments = [start(runner), *records(runner)]
    assert len(moments) > 1
    counts = nonzeros(moments[0]['masks'])
    for i, moment in enumerate(moments):
        assert nonzeros(moment['masks']) == counts, i
        for name, mask in moment['masks'].items():
            assert moment['weights'][name][~mask].count_nonzero() == 0, (i, name)


def log_of(runner) -> str:
    (file,) = Path(runner.log_dir).glob('*.log')
    return file.read_text(encoding='utf-8')


def scalars_of(runner) -> list[dict]:
    """Lines of the visualizer's scalars that the hook wrote."""
    lines = Path(runner.log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    return [line for line in map(json.loads, lines) if 'sparse/density' in line]


# ---------------------------------------------------------------- exact sparsity


@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize('grow', ['random', 'gradient', 'momentum'])
def test_zeros_are_zero_and_counts_constant_after_every_step(tmp_path, optimizer, grow):
    skip_without(optimizer)
    runner = train(tmp_path, dict(ACTIVE, grow=grow), optimizer=optimizer)
    assert changed_at(runner) == [2, 4, 6]
    assert_exactly_sparse(runner)
    assert {n: tuple(m.shape) for n, m in start(runner)['masks'].items()} == SHAPES
    assert sum(nonzeros(start(runner)['masks']).values()) == KEPT
    # Every weight has had a step since it was last grown, so none but the masked ones are zero.
    saved = load(tmp_path, 8)['state_dict']
    masks = hook_of(runner).masks.active
    assert all(torch.equal(saved[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize('drop', ['magnitude', 'set'])
@pytest.mark.parametrize('init', ['snip', 'erk', 'uniform'])
def test_the_share_of_zeros_is_the_one_asked_for(tmp_path, init, drop):
    sparse = dict(ACTIVE, sparsity=0.35, init=init, drop=drop)
    runner = train(tmp_path, sparse, iters=4)
    assert changed_at(runner) == [2]
    assert_exactly_sparse(runner)
    kept = round(WEIGHTS * 0.65)
    assert sum(nonzeros(start(runner)['masks']).values()) == kept
    assert nonzeros(load(tmp_path, 4)['state_dict']) == nonzeros(runner.model.state_dict())


def test_a_map_gives_every_tensor_its_own_sparsity(tmp_path):
    sparsities = {'stem.weight': 0.5, '^(mix|head)': 0.25}
    runner = train(tmp_path, dict(ACTIVE, init=dict(type='map', sparsities=sparsities)))
    assert_exactly_sparse(runner)
    assert nonzeros(start(runner)['masks']) == {
        'stem.weight': 108,
        'strip.weight': 216,
        'mix.weight': 96,
        'head.weight': 48,
    }


def test_the_names_of_the_saved_weights_are_those_of_a_dense_model(tmp_path):
    train(tmp_path / 'sparse', ACTIVE, iters=2)
    saved = load(tmp_path / 'sparse', 2)['state_dict']
    assert list(saved) == list(Toy().state_dict())


@pytest.mark.parametrize('grow', ['random', 'gradient'])
def test_sparsity_zero_is_the_dense_run_to_the_bit(tmp_path, grow):
    options = dict(optimizer=ADAMW, ema=True)
    train(tmp_path / 'dense', **options)
    sparse = dict(ACTIVE, sparsity=0, grow=grow, grown_state='mask')
    train(tmp_path / 'zero', sparse, **options)
    dense, zero = load(tmp_path / 'dense', 8), load(tmp_path / 'zero', 8)
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert_same(zero[key], dense[key], key)


@pytest.mark.parametrize('grow', ['random', 'gradient'])
def test_channels_last_weights_are_as_sparse(tmp_path, grow):
    torch.manual_seed(0)
    model = Toy().to(memory_format=torch.channels_last)
    assert not model.stem.weight.is_contiguous()
    runner = train(tmp_path, dict(ACTIVE, grow=grow, grown_state='mask'), model=model, ema=True)
    assert changed_at(runner) == [2, 4, 6]
    assert_exactly_sparse(runner)
    assert_average_on_masks(runner)


def test_all_random_numbers_come_from_the_hooks_seed(tmp_path):
    runs = {
        (seed, hook_seed): train(
            tmp_path / f'{seed}{hook_seed}',
            dict(ACTIVE, init='uniform', seed=hook_seed, prune_rate=1.0),
            randomness=dict(seed=seed),
        )
        for seed, hook_seed in [(0, 0), (1, 0), (0, 1)]
    }
    masks = {key: [r['masks'] for r in records(runner)] for key, runner in runs.items()}
    assert_same(masks[0, 0], masks[1, 0])
    weights = {key: records(runner)[-1]['weights'] for key, runner in runs.items()}
    assert not torch.equal(weights[0, 0]['stem.weight'], weights[1, 0]['stem.weight'])
    for i in (0, 7):
        assert not torch.equal(masks[0, 0][i]['stem.weight'], masks[0, 1][i]['stem.weight'])


# ---------------------------------------------------------------- when


def test_accumulation_makes_the_same_updates_at_the_same_optimizer_steps(tmp_path):
    """Each batch twice at half the weight is the same gradient to the bit; the last comes once."""
    sparse = dict(ACTIVE, grow='gradient', init='uniform')
    options = dict(shuffle=False, ema=True)
    once = train(
        tmp_path / '1', sparse, data=RepeatedBatches(4, 1), iters=8, model=toy(), **options
    )
    twice = train(
        tmp_path / '2',
        sparse,
        data=RepeatedBatches(4, 2),
        iters=15,
        model=toy(),
        wrapper=dict(accumulative_counts=2),
        **options,
    )
    assert changed_at(once) == [2, 4, 6]
    assert changed_at(twice) == [4, 8, 12]
    assert [r['step'] for r in records(twice)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8]
    assert_exactly_sparse(twice)
    steps = [*range(1, 15, 2), 14]
    for step, i in enumerate(steps):
        for key in ('masks', 'weights', 'state'):
            assert_same(records(twice)[i][key], records(once)[step][key], f'{key} of step {step}')


def toy() -> Toy:
    """Without batch norm, whose statistics accumulation changes."""
    torch.manual_seed(0)
    return Toy(norm=False)


@pytest.mark.parametrize(
    ('stop_fraction', 'iters', 'updates'),
    [(1.0, 8, [2, 4, 6]), (1.0, 7, [2, 4, 6]), (0.5, 8, [2]), (0.5, 10, [2, 4]), (0.1, 8, [])],
)
def test_updates_end_before_the_last_step_and_at_the_stop(tmp_path, stop_fraction, iters, updates):
    runner = train(tmp_path, dict(ACTIVE, stop_fraction=stop_fraction), iters=iters)
    assert changed_at(runner) == updates
    assert hook_of(runner).step == iters


def test_interval_zero_keeps_the_masks(tmp_path):
    runner = train(tmp_path, dict(update_interval=0))
    assert changed_at(runner) == []
    assert_exactly_sparse(runner)


def cosine(step: int, steps: int) -> float:
    return 0.1 + (0.9 - 0.1) * (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize(
    ('prune_rate', 'expected'),
    [
        (0.2, [0.2, 0.2, 0.2]),
        (dict(type='linear', start=0.8, end=0.0), [0.6, 0.4, 0.2]),
        (dict(type='cosine', start=0.9, end=0.1), [cosine(s, 8) for s in (2, 4, 6)]),
    ],
    ids=['constant', 'linear', 'cosine'],
)
def test_the_rate_is_the_schedules_at_that_step(tmp_path, prune_rate, expected):
    runner = train(tmp_path, dict(update_interval=2, prune_rate=prune_rate, init='uniform'))
    lines = scalars_of(runner)
    assert [line['step'] for line in lines] == [0, 2, 4, 6]
    rates = [line['sparse/prune_rate'] for line in lines[1:]]
    assert rates == pytest.approx(expected, abs=1e-12)
    # What was dropped and came back at once is not churn.
    assert all(0 < line['sparse/churn'] < rate + 0.01 for line, rate in zip(lines[1:], rates))


def test_the_schedule_ends_at_the_stop(tmp_path):
    rate = dict(type='linear', start=0.8, end=0.0)
    runner = train(tmp_path, dict(update_interval=2, prune_rate=rate, stop_fraction=0.5), iters=16)
    rates = [line['sparse/prune_rate'] for line in scalars_of(runner)[1:]]
    assert rates == pytest.approx([0.6, 0.4, 0.2])


# ---------------------------------------------------------------- mixed precision


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.filterwarnings('ignore:.*GradScaler is enabled, but CUDA is not available')
@pytest.mark.parametrize('optimizer', ['sgd', 'adamw-foreach'])
def test_bf16_keeps_every_zero(tmp_path, optimizer):
    dtypes = set()
    model = Toy()
    model.mix.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    runner = train(
        tmp_path,
        dict(ACTIVE, grow='gradient'),
        model=model,
        optimizer=OPTIMIZERS[optimizer],
        wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16'),
    )
    assert torch.bfloat16 in dtypes
    assert changed_at(runner) == [2, 4, 6]
    assert_exactly_sparse(runner)


class Overflow(Hook):
    """Makes the gradient infinite in the given iterations, counted from 1."""

    def __init__(self, iterations: set[int]) -> None:
        self.iterations = iterations

    def before_train(self, runner) -> None:
        def spoil(gradient: Tensor) -> Tensor:
            return gradient * math.inf if runner.iter + 1 in self.iterations else gradient

        runner.model.stem.weight.register_hook(spoil)


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('grow', ['random', 'gradient'])
@pytest.mark.parametrize('optimizer', ['sgd', 'adamw-foreach', 'sgd-fused', 'adamw-fused'])
def test_steps_that_overflow_advance_nothing(tmp_path, monkeypatch, optimizer, grow):
    skip_without(OPTIMIZERS[optimizer])
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip(f'torch {torch.__version__} has no GradScaler for the CPU')
    scaler = functools.partial(torch.amp.GradScaler, 'cpu', init_scale=4.0)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    # 3 is where the first update was due, 5 comes right after it, 8 is in between.
    overflows = {3, 5, 8}
    runner = train(
        tmp_path,
        dict(update_interval=3, prune_rate=0.3, grow=grow),
        optimizer=OPTIMIZERS[optimizer],
        wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16'),
        iters=10,
        hooks=[Overflow(overflows)],
        ema=True,
    )
    moments = [start(runner), *records(runner)]
    assert [m['step'] for m in moments] == [0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7]
    assert changed_at(runner) == [4, 9]
    assert runner.optim_wrapper.loss_scaler.get_scale() == 0.5  # 4 halved three times
    for i in overflows:
        for key in ('masks', 'weights', 'state'):
            assert_same(moments[i][key], moments[i - 1][key], f'{key} of iteration {i}')
    assert_exactly_sparse(runner)
    assert_average_on_masks(runner)
    # Iteration 6 takes the first step after the update of iteration 4.
    assert_average_is_live(moments[6], grown(moments[3], moments[4]))


# ---------------------------------------------------------------- averaged weights


def grown(before: dict, after: dict) -> dict[str, Tensor]:
    """Positions that are active in the later record only; some in every tensor."""
    positions = {n: after['masks'][n] & ~mask for n, mask in before['masks'].items()}
    assert all(nonzeros(positions).values())
    return positions


def assert_average_on_masks(runner) -> None:
    for i, record in enumerate(records(runner)):
        for name, mask in record['masks'].items():
            assert record['ema'][name][~mask].count_nonzero() == 0, (i, name)


def assert_average_is_live(record: dict, where: dict[str, Tensor]) -> None:
    for name, positions in where.items():
        live = record['weights'][name][positions]
        assert live.count_nonzero() == live.numel()
        assert torch.equal(record['ema'][name][positions], live)


@pytest.mark.parametrize('counts', [1, 2])
def test_averages_have_the_masks_zeros_in_every_checkpoint(tmp_path, counts):
    runner = train(
        tmp_path,
        dict(update_interval=3, prune_rate=0.4),
        iters=8 * counts,
        ema=True,
        save_every=1,
        wrapper=dict(accumulative_counts=counts),
    )
    assert changed_at(runner) == [3 * counts, 6 * counts]
    assert_average_on_masks(runner)
    for i, record in enumerate(records(runner), start=1):
        saved = load(tmp_path, i)
        for name, mask in record['masks'].items():
            average, live = saved['state_dict'][name], saved['ema_state_dict'][f'module.{name}']
            assert torch.equal(average, record['ema'][name])
            assert torch.equal(live, record['weights'][name])
            assert average[~mask].count_nonzero() == 0
            if i > 1:
                assert not torch.equal(average, live)
    moments = [start(runner), *records(runner)]
    for update in (3 * counts, 6 * counts):
        new = grown(moments[update - 1], moments[update])
        for name, positions in new.items():
            assert moments[update]['ema'][name][positions].count_nonzero() == 0
        assert_average_is_live(moments[update + counts], new)


def test_without_the_hook_averages_would_be_nearly_dense(tmp_path):
    """The test above can fail: averages of moving masks do not keep their zeros by themselves."""

    class Average(Hook):
        priority = 'LOWEST'
        total = None

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            now = copies({name: parameters(runner)[name] for name in SHAPES})
            old = self.total or now
            self.total = {name: 0.9 * old[name] + 0.1 * now[name] for name in now}

    average = Average()
    train(tmp_path, dict(ACTIVE, prune_rate=0.5), hooks=[average])
    assert sum(nonzeros(average.total).values()) > KEPT * 1.3


# ---------------------------------------------------------------- drop and grow


class Witness(Hook):
    """Before the sparse hook sees a step: the gradients and what the optimizer made of them."""

    priority = 'HIGH'

    def __init__(self) -> None:
        self.gradients: list[dict] = []
        self.weights: list[dict] = []

    def before_train(self, runner) -> None:
        weights = {name: parameters(runner)[name] for name in SHAPES}
        optimizer = runner.optim_wrapper.optimizer
        optimizer.register_step_pre_hook(
            lambda *args: self.gradients.append({n: w.grad.clone() for n, w in weights.items()})
        )
        optimizer.register_step_post_hook(lambda *args: self.weights.append(copies(weights)))


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
@pytest.mark.parametrize('grow', ['gradient', 'momentum'])
def test_the_smallest_weights_are_dropped_and_the_largest_scores_grown(tmp_path, grow, optimizer):
    witness = Witness()
    rate = dict(type='linear', start=0.5, end=0.0)  # 0.25 after half of the steps
    runner = train(
        tmp_path,
        dict(update_interval=4, prune_rate=rate, grow=grow),
        optimizer=OPTIMIZERS[optimizer],
        hooks=[witness],
    )
    before, after = records(runner)[2], records(runner)[3]
    for name in SHAPES:
        mask = before['masks'][name].flatten()
        weight = (witness.weights[3][name].flatten() * mask).abs()
        count = math.ceil(0.25 * int(mask.sum()))
        kept = mask.clone()
        kept[weight.masked_fill(~mask, math.inf).argsort()[:count]] = False
        if grow == 'gradient':
            score = witness.gradients[3][name]
        else:
            state = after['state'][name]
            score = state['momentum_buffer' if optimizer == 'sgd' else 'exp_avg']
        order = score.flatten().abs().masked_fill(kept, -1).argsort(descending=True)
        expected = kept.clone()
        expected[order[:count]] = True
        assert torch.equal(after['masks'][name].flatten(), expected), name
        assert not torch.equal(expected, mask)


def test_set_drops_next_to_zero_on_either_side(tmp_path):
    """What both ways to drop would keep stays; the one in use also keeps what the other drops."""
    for method, other in (('set', 'magnitude'), ('magnitude', 'set')):
        witness = Witness()
        sparse = dict(update_interval=4, prune_rate=0.5, drop=method)
        runner = train(tmp_path / method, sparse, iters=5, hooks=[witness])
        before, after = records(runner)[2]['masks'], records(runner)[3]['masks']
        lost = dict.fromkeys((method, other), 0)
        for name, mask in before.items():
            weight, count = witness.weights[3][name] * mask, math.ceil(int(mask.sum()) / 2)
            for kind in lost:
                kept = sparsity.drop(weight, mask, count, kind)
                lost[kind] += int((kept & ~after[name]).sum())
        assert lost[method] == 0
        assert lost[other] > 0


def test_gradients_are_those_that_the_optimizer_uses(tmp_path):
    """Clipped by value to nearly nothing, all gradients are equal: the lowest indices grow."""
    runner = train(
        tmp_path,
        dict(update_interval=2, prune_rate=0.25, grow='gradient'),
        iters=3,
        wrapper=dict(clip_grad=dict(type='value', clip_value=1e-30)),
    )
    before, after = records(runner)[0], records(runner)[1]
    mask, new = before['masks']['stem.weight'].flatten(), after['masks']['stem.weight'].flatten()
    weight = before['weights']['stem.weight'].flatten().abs()
    count = math.ceil(0.25 * int(mask.sum()))
    kept = mask.clone()
    kept[weight.masked_fill(~mask, math.inf).argsort()[:count]] = False
    assert (new & ~kept).nonzero().flatten().tolist() == (~kept).nonzero().flatten()[
        :count
    ].tolist()


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_state_of_grown_weights(tmp_path, optimizer):
    """keep: what gathered while zero; zero: none when grown; mask: none while inactive."""
    moments = {}
    for kind in ('keep', 'zero', 'mask'):
        sparse = dict(update_interval=3, prune_rate=0.3, grown_state=kind)
        runner = train(tmp_path / kind, sparse, iters=5, optimizer=OPTIMIZERS[optimizer])
        moments[kind] = [start(runner), *records(runner)]
        assert changed_at(runner) == [3]
    keys = ['momentum_buffer'] if optimizer == 'sgd' else ['exp_avg', 'exp_avg_sq']

    def share(kind: str, iteration: int, where: str) -> float:
        """Share of non-zero state in grown or in all inactive positions."""
        now = moments[kind][iteration]
        fresh = grown(moments[kind][2], moments[kind][3])
        values = torch.cat(
            [
                now['state'][name][key][fresh[name] if where == 'grown' else ~mask]
                for name, mask in now['masks'].items()
                for key in keys
            ]
        )
        return int(values.count_nonzero()) / values.numel()

    assert share('keep', 3, 'grown') > 0.9
    assert share('keep', 3, 'inactive') > 0.9
    assert share('zero', 3, 'grown') == 0
    assert share('zero', 3, 'inactive') > 0.9
    assert share('mask', 3, 'grown') == 0
    assert [share('mask', i, 'inactive') for i in range(1, 6)] == [0] * 5
    assert all(share(kind, 4, 'grown') > 0.9 for kind in moments)
    # Nothing but the state of inactive weights differs, so the weights are the same till they grow.
    assert_same(moments['zero'][3]['weights'], moments['keep'][3]['weights'])


needs_step_hooks = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.3'),
    reason='torch 2.1 takes the step hooks from every optimizer once anything is compiled',
)


@needs_step_hooks
def test_a_compiled_run_makes_the_same_updates(tmp_path):
    sparse = dict(ACTIVE, grow='gradient')
    eager = train(tmp_path / 'eager', sparse)
    compiled = train(tmp_path / 'compiled', sparse, cfg=dict(compile=dict(backend='eager')))
    torch._dynamo.reset()
    assert compiled.model.train_step._torchdynamo_orig_callable is not None
    assert changed_at(compiled) == [2, 4, 6]
    assert_exactly_sparse(compiled)
    for one, other in zip(records(compiled), records(eager)):
        assert one['step'] == other['step']
        assert_same(one['masks'], other['masks'])


@pytest.mark.parametrize('counts', [1, 2])
def test_an_optimizer_that_drops_its_step_hooks_is_an_error(tmp_path, counts):
    """Nothing would be masked, and training would silently become dense."""

    class Hookless(torch.optim.SGD):
        def step(self, closure=None):
            return torch.optim.SGD.step.__wrapped__(self, closure)

        step.hooked = True  # keeps torch from adding the calls of the hooks

    model = Toy()
    torch.optim.SGD(model.parameters(), lr=0.1)  # has its step wrapped
    wrapper = OptimWrapper(Hookless(model.parameters(), lr=0.1), accumulative_counts=counts)
    with pytest.raises(RuntimeError, match=r'stem\.weight has left its mask'):
        train(tmp_path, dict(update_interval=0), model=model, optim_wrapper=wrapper)


# ---------------------------------------------------------------- the SNIP start


def test_snip_leaves_the_run_as_it_was(tmp_path):
    """Model, random states and the order of the data are those of a run that starts otherwise."""

    class Witness(Hook):
        priority = 'LOWEST'

        def before_train(self, runner) -> None:
            self.random = random.random(), np.random.rand(), torch.rand(1).item()
            self.buffers = copies(dict(runner.model.named_buffers()))
            self.gradients = [p.grad for p in runner.model.parameters()]
            self.batches = []

        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            self.batches.append(data_batch['x'])

    class Drawing(Data):
        """Augments at random, with each generator that augmentations use."""

        def __getitem__(self, index: int) -> dict:
            sample = super().__getitem__(index)
            noise = random.random() + np.random.rand() + torch.rand(1).item()
            return dict(sample, x=sample['x'] + noise)

    witnesses, runners = {}, {}
    for init in ('uniform', 'snip'):
        witnesses[init] = Witness()
        torch.manual_seed(0)
        runners[init] = train(
            tmp_path / init,
            dict(init=init, update_interval=0),
            data=Drawing(),
            iters=3,
            model=Toy(),
            hooks=[witnesses[init]],
        )
    uniform, snip = witnesses['uniform'], witnesses['snip']
    assert snip.random == uniform.random
    assert_same(snip.buffers, uniform.buffers)
    assert snip.gradients == [None] * len(snip.gradients)
    assert_same(snip.batches, uniform.batches)
    # The starts differ in the masks only.
    torch.manual_seed(0)
    weights = dict(Toy().named_parameters())
    for runner in runners.values():
        begin = start(runner)
        for name, weight in weights.items():
            mask = begin['masks'].get(name, torch.tensor(True))
            assert torch.equal(begin['weights'][name], weight * mask), name
    assert nonzeros(start(runners['snip'])['masks']) != nonzeros(start(runners['uniform'])['masks'])


def sensitivities(data: list[int]) -> dict[str, Tensor]:
    """|w · ∂L/∂w| of `toy()` for the mean loss over samples."""
    model, samples = toy(), [Data()[i] for i in data]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ('x', 'y')}
    model(**batch, mode='loss')['loss'].backward()
    return {n: (w * w.grad).abs() for n, w in model.named_parameters() if n in SHAPES}


@pytest.mark.parametrize('batches', [1, 4])
def test_snip_masks_keep_the_weights_that_matter_most(tmp_path, batches):
    data, batch_size = (Data(1), 1) if batches == 1 else (Data(4), 1)
    init = dict(type='snip', batches=batches, mode='mask')
    runner = train(
        tmp_path,
        dict(init=init, update_interval=0),
        model=toy(),
        data=data,
        batch_size=batch_size,
        iters=1,
    )
    scores = sensitivities(list(range(batches)))
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True)[0][KEPT - 1]
    masks = start(runner)['masks']
    wrong = sum(int((masks[n] != (s >= threshold)).sum()) for n, s in scores.items())
    assert wrong <= (0 if batches == 1 else 2)  # sums of four in another order may swap neighbours
    assert sum(nonzeros(masks).values()) == KEPT


def test_snip_densities_come_from_scores_and_positions_from_chance(tmp_path):
    runner = train(
        tmp_path, dict(update_interval=0), model=toy(), data=Data(1), batch_size=1, iters=1
    )
    scores = sensitivities([0])
    order = torch.cat([s.flatten() for s in scores.values()]).argsort(descending=True)
    top = torch.zeros(WEIGHTS, dtype=torch.bool)
    top[order[:KEPT]] = True
    parts = dict(zip(scores, top.split([s.numel() for s in scores.values()])))
    masks = start(runner)['masks']
    assert sum(nonzeros(masks).values()) == KEPT
    assert max(int(p.sum()) / p.numel() for p in parts.values()) < 0.99  # none becomes dense
    assert nonzeros(masks) == nonzeros(parts)
    assert any(not torch.equal(masks[n].flatten(), part) for n, part in parts.items())


# ---------------------------------------------------------------- what is masked


def test_defaults_and_presets():
    hook = SparseTrainingHook()
    assert (hook.sparsity, hook.init, hook.drop, hook.grow) == (
        0.4,
        {'type': 'snip'},
        'magnitude',
        'random',
    )
    assert (hook.update_interval, hook.stop_fraction, hook.grown_state, hook.seed) == (
        100,
        1.0,
        'keep',
        0,
    )
    assert hook.prune_rate == dict(type='cosine', start=0.3, end=0.005)
    published = {'slak_t': (0.5, 2000), 'slak_s': (0.3, 100), 'slak_b': (0.3, 100)}
    for preset, (rate, interval) in published.items():
        hook = SparseTrainingHook(preset=preset)
        assert hook.prune_rate == dict(type='cosine', start=rate, end=0.005)
        assert (hook.update_interval, hook.sparsity, hook.init) == (interval, 0.4, {'type': 'snip'})
    hook = SparseTrainingHook(preset='finetune')
    assert (hook.init, hook.update_interval) == ({'type': 'from_weights'}, 0)
    assert [p.pattern for p in hook.include] == [r'^backbone\.']


def test_arguments_win_over_the_preset():
    hook = SparseTrainingHook(
        preset='slak_t', update_interval=7, prune_rate=0.1, sparsity=0, init='erk', seed=3
    )
    assert (hook.update_interval, hook.sparsity, hook.seed) == (7, 0, 3)
    assert hook.prune_rate == dict(type='constant', start=0.1)
    assert hook.init == {'type': 'erk'}
    hook = SparseTrainingHook(preset='finetune', update_interval=10, include='head')
    assert hook.update_interval == 10
    assert [p.pattern for p in hook.include] == ['head']


@pytest.mark.parametrize('preset', PRESETS)
def test_what_is_given_as_the_default_or_none_is_not_left_out(preset):
    plain, chosen = SparseTrainingHook(), SparseTrainingHook(preset=preset)
    for given in [*({name: DEFAULTS[name]} for name in PRESETS[preset]), DEFAULTS]:
        hook = SparseTrainingHook(preset=preset, **given)
        for name in DEFAULTS:
            expected = plain if name in given else chosen
            assert getattr(hook, name) == getattr(expected, name), (name, given)


@pytest.mark.parametrize('name', [name for name in DEFAULTS if DEFAULTS[name] is not None])
def test_none_where_it_is_no_value(name):
    with pytest.raises(ValueError, match=f'{name}: expected a value, got None; left out it is'):
        SparseTrainingHook(preset='finetune', **{name: None})


@pytest.mark.parametrize(
    ('patterns', 'expected'),
    [
        (dict(), list(SHAPES)),
        (dict(include='.*'), list(SHAPES)),
        (dict(include=r'^st'), ['stem.weight', 'strip.weight']),
        (dict(include=['^mix', 'head']), ['mix.weight', 'head.weight']),
        (dict(exclude='^head'), ['stem.weight', 'strip.weight', 'mix.weight']),
        (dict(include='^st', exclude=['strip']), ['stem.weight']),
    ],
)
def test_regular_expressions_choose_and_1d_tensors_are_never_masked(tmp_path, patterns, expected):
    runner = train(tmp_path, dict(patterns, update_interval=0), iters=1)
    assert list(start(runner)['masks']) == expected
    assert 'norm.weight' in parameters(runner)


@needs_step_hooks
def test_names_are_those_before_torch_compile_wraps_a_module(tmp_path):
    class Wrap(Hook):
        priority = 'HIGHEST'

        def before_train(self, runner) -> None:
            runner.model.stem = torch.compile(runner.model.stem, backend='eager')
            assert 'stem._orig_mod.weight' in parameters(runner)

    hook = SparseTrainingHook(**ACTIVE, include=r'^stem\.weight$')
    runner = build_runner(tmp_path, iters=3, hooks=[hook, Wrap()])
    runner.train()
    torch._dynamo.reset()
    assert hook.masks.nnz == {'stem.weight': round(216 * 0.6)}
    weight = runner.model.stem._orig_mod.weight
    assert torch.equal(weight != 0, hook.masks.active['stem.weight'])


def test_frozen_weights_are_left_alone(tmp_path):
    model = Toy()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    runner = train(tmp_path, ACTIVE, model=model)
    assert list(start(runner)['masks']) == list(SHAPES)[1:]
    assert torch.equal(runner.model.stem.weight, before)
    assert '1 frozen tensors are left alone' in log_of(runner)


class Classifier(BaseModel):
    """The reference's 40 % sparse SLaK, as `init_cfg` loads it, under a new head."""

    def __init__(self) -> None:
        super().__init__()
        name = 'slak_decomposed_sparse40'
        checkpoint = str(GOLDEN / f'{name}.pth')
        self.backbone = SLaK(
            **slak_options(name), init_cfg=dict(type='Pretrained', checkpoint=checkpoint)
        )
        with torch.no_grad():
            channels = self.backbone(torch.zeros(1, 3, 64, 64))[-1].shape[1]
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        x = nn.functional.interpolate(x, (64, 64))
        logits = self.head(self.backbone(x)[-1].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def test_finetuning_holds_the_zeros_of_the_pretrained_backbone(tmp_path):
    runner = train(
        tmp_path, dict(preset='finetune'), model=Classifier(), optimizer=ADAMW, iters=4, ema=True
    )
    begin, end = start(runner), records(runner)[-1]
    assert all(name.startswith('backbone.') for name in begin['masks'])
    total = sum(mask.numel() for mask in begin['masks'].values())
    kept = sum(nonzeros(begin['masks']).values())
    assert 0.55 < kept / total < 0.65
    for name, mask in begin['masks'].items():
        assert torch.equal(mask, begin['weights'][name] != 0), name
    assert changed_at(runner) == []
    assert_exactly_sparse(runner)
    assert_average_on_masks(runner)
    moved = {n: not torch.equal(end['weights'][n], begin['weights'][n]) for n in begin['masks']}
    assert all(moved.values())
    assert end['weights']['head.weight'].count_nonzero() == end['weights']['head.weight'].numel()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(sparsity=1.0), r'sparsity: expected a number in \[0, 1\), got 1.0'),
        (dict(sparsity=-0.1), r'sparsity: expected a number in \[0, 1\), got -0.1'),
        (dict(sparsity='0.4'), r"sparsity: expected a number in \[0, 1\), got '0.4'"),
        (dict(drop='magic'), r"unknown drop 'magic': expected one of 'magnitude', 'set'"),
        (dict(grow='rigl'), r"unknown grow 'rigl': .* 'random', 'gradient', 'momentum'"),
        (dict(init='er'), r"unknown init 'er': .* 'snip', 'erk', 'uniform', 'from_weights', 'map'"),
        (dict(grown_state='reset'), r"unknown grown_state 'reset': .* 'keep', 'zero', 'mask'"),
        (
            dict(preset='slak'),
            r"unknown preset 'slak': .* 'slak_t', 'slak_s', 'slak_b', 'finetune'",
        ),
        (dict(resume_fallback='guess'), r"unknown resume_fallback 'guess': .*'from_weights'"),
        (
            dict(prune_rate=dict(type='step', start=1)),
            r"unknown prune_rate.type 'step': .*'cosine'",
        ),
        (dict(prune_rate=1.5), r'prune_rate: start must be in \[0, 1\], got 1.5'),
        (dict(prune_rate=dict(type='cosine')), r'prune_rate: .*start'),
        (dict(update_interval=-1), r'update_interval: expected a number of optimizer steps'),
        (dict(update_interval=2.5), r'update_interval: expected a number of optimizer steps'),
        (dict(stop_fraction=0.0), r'stop_fraction: expected to be in \(0, 1\]'),
        (dict(init=dict(type='snip', mode='top')), r"unknown init.mode 'top': .*'density', 'mask'"),
        (dict(init=dict(type='erk', batches=1)), r"init: 'erk' takes no 'batches'"),
        (dict(init='map'), r"init: 'map' needs sparsities="),
        (dict(seed=-1), r'seed: expected an integer in \[0, 2\*\*32\), got -1'),
        (dict(include='('), r"not a regular expression: '\('"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseTrainingHook(**settings)


def test_no_parameter_matches(tmp_path):
    with pytest.raises(
        SparseTrainingError, match=r'no parameter to mask: of 10 parameters, 0 match'
    ) as error:
        train(tmp_path, dict(include='backbone', update_interval=0))
    assert 'stem.weight, stem.bias' in str(error.value)


def test_all_that_match_are_frozen(tmp_path):
    model = Toy()
    model.stem.requires_grad_(False)
    with pytest.raises(SparseTrainingError, match=r'1 match include=.* none of those is trained'):
        train(tmp_path, dict(include='^stem', update_interval=0), model=model)


@pytest.mark.parametrize(('counts', 'steps'), [(1, 8), (3, 3)])
def test_an_interval_longer_than_the_run(tmp_path, counts, steps):
    wrapper = dict(accumulative_counts=counts)
    message = rf'update_interval: {steps + 1} optimizer steps is longer than the run of {steps}'
    with pytest.raises(SparseTrainingError, match=message):
        train(tmp_path / 'long', dict(update_interval=steps + 1), wrapper=wrapper)
    train(tmp_path / 'fits', dict(update_interval=steps), wrapper=wrapper)


def test_a_map_that_matches_nothing(tmp_path):
    with pytest.raises(SparseTrainingError, match=r"'neck' matches none of the 4 tensors"):
        train(tmp_path, dict(ACTIVE, init=dict(type='map', sparsities={'neck': 0.5})))


def test_several_optimizers(tmp_path):
    model = Toy()
    wrappers = OptimWrapperDict(
        stem=OptimWrapper(torch.optim.SGD(model.stem.parameters(), lr=0.1)),
        head=OptimWrapper(torch.optim.SGD(model.head.parameters(), lr=0.1)),
    )
    with pytest.raises(SparseTrainingError, match='needs one optimizer, got a OptimWrapperDict'):
        train(tmp_path, ACTIVE, model=model, optim_wrapper=wrappers)


def with_unused_layer() -> Toy:
    model = toy()
    model.unused = nn.Linear(4, 4)
    return model


def test_snip_needs_a_gradient(tmp_path):
    with pytest.raises(SparseTrainingError, match='are 0 in 1 of 1 masked tensors'):
        train(tmp_path, dict(ACTIVE, include='unused'), model=with_unused_layer())


@pytest.mark.parametrize('mode', ['density', 'mask'])
def test_snip_needs_a_gradient_in_every_tensor(tmp_path, mode):
    sparse = dict(update_interval=0, init=dict(type='snip', mode=mode))
    message = r'are 0 in 1 of 5 masked tensors \(unused\.weight\)'
    with pytest.raises(SparseTrainingError, match=message):
        train(tmp_path, sparse, model=with_unused_layer())


def test_snip_judges_gradients_by_those_of_all_ranks(tmp_path, monkeypatch):
    # As if another rank's batch had used the layer.
    monkeypatch.setattr(snip, 'all_reduce', lambda gradient, op: gradient.add_(1))
    train(tmp_path, dict(update_interval=0), model=with_unused_layer(), iters=1)


class ResNetClassifier(BaseModel):
    """mmpretrain's ResNet, as small as it goes."""

    def __init__(self, **options) -> None:
        from mmpretrain.models import ResNet

        super().__init__()
        self.backbone = ResNet(18, stem_channels=8, base_channels=8, **options)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        logits = self.head(self.backbone(x)[-1].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def test_snip_over_blocks_that_start_as_the_identity(tmp_path):
    """OpenMMLab's ResNets have their last norms at zero: no gradient reaches what is before."""
    sparse = dict(update_interval=0)
    with pytest.raises(SparseTrainingError) as error:
        train(tmp_path / 'stock', sparse, model=ResNetClassifier())
    for part in (
        'in 16 of 21 masked tensors (backbone.layer1.0.conv1.weight',
        'and 13 more',
        'zero_init_residual=False',
        "init='uniform'",
    ):
        assert part in str(error.value)
    model = ResNetClassifier(zero_init_residual=False)
    runner = train(tmp_path / 'plain', sparse, model=model, iters=1)
    assert min(nonzeros(start(runner)['masks']).values()) > 0


# ---------------------------------------------------------------- reports


def with_wide_layer() -> Toy:
    """A linear layer of which ERK can take all zeros; its weights have no gradient."""
    model = Toy()
    model.wide = nn.Linear(128, 128)
    return model


def test_erk_warns_when_all_large_kernels_stay_dense(tmp_path):
    sparse = dict(init='erk', update_interval=0)
    runner = train(tmp_path / 'erk', sparse, model=with_wide_layer(), iters=1)
    counts = nonzeros(start(runner)['masks'])
    assert counts['strip.weight'] == 216
    assert sum(counts.values()) == round(0.6 * (WEIGHTS + 128 * 128))
    assert 'ERK leaves all 1 large kernels dense at sparsity 0.4' in log_of(runner)
    sparse = dict(sparse, init='uniform')
    runner = train(tmp_path / 'uniform', sparse, model=with_wide_layer(), iters=1)
    assert 'ERK' not in log_of(runner)
    runner = train(tmp_path / 'sparse', dict(sparse, init='erk'), iters=1)
    assert nonzeros(start(runner)['masks'])['strip.weight'] < 216
    assert 'ERK' not in log_of(runner)


@pytest.mark.parametrize('grow', ['gradient', 'momentum'])
def test_weights_without_a_gradient_score_zero(tmp_path, grow):
    runner = train(tmp_path, dict(ACTIVE, init='uniform', grow=grow), model=with_wide_layer())
    assert 2 in changed_at(runner)
    assert_exactly_sparse(runner)


def test_weights_without_zeros_are_reported(tmp_path):
    runner = train(tmp_path, dict(init='from_weights', update_interval=0), iters=1)
    assert 'the weights have no zeros' in log_of(runner)


def test_a_few_accidental_zeros_are_those_of_dense_weights(tmp_path):
    model = Toy()
    with torch.no_grad():
        model.stem.weight[0, 0, 0, :2] = 0
    runner = train(tmp_path, dict(init='from_weights', update_interval=0), model=model, iters=1)
    assert f'no zeros to keep (2 of {WEIGHTS} are 0)' in log_of(runner)


@pytest.mark.parametrize(
    ('init', 'name'),
    [
        ('from_weights', 'mix.weight'),
        ('uniform', 'scale'),
        (dict(type='map', sparsities={'scale': 0.9}), 'scale'),
    ],
)
def test_tensors_without_an_active_weight_are_reported(tmp_path, init, name):
    model = Toy()
    nn.init.zeros_(model.mix.weight)
    model.scale = nn.Parameter(torch.ones(1, 1))
    sparse = dict(init=init, update_interval=0, sparsity=0.9)
    runner = train(tmp_path, sparse, model=model, iters=1)
    message = f'1 of 5 masked tensors have no active weight and stay zero for good: {name}'
    assert message in log_of(runner)


def test_new_masks_over_sparse_weights_are_reported(tmp_path):
    sparse = train(tmp_path / 'sparse', dict(init='uniform', update_interval=0), iters=1).model
    again = dict(init='uniform', update_interval=0, seed=1)
    runner = train(tmp_path / 'again', again, model=sparse, iters=1)
    assert "init='uniform' draws other masks over them, 'from_weights' keeps" in log_of(runner)
    runner = train(tmp_path / 'dense', again, iters=1)
    assert 'draws other masks' not in log_of(runner)


@pytest.mark.parametrize(
    ('interval', 'fraction', 'warned'), [(8, 1.0, True), (4, 0.5, True), (3, 0.5, False)]
)
def test_a_run_without_any_update_is_reported(tmp_path, interval, fraction, warned):
    sparse = dict(init='uniform', update_interval=interval, stop_fraction=fraction)
    runner = train(tmp_path, sparse, iters=8)
    assert ('no update in this run' in log_of(runner)) == warned
    assert bool(changed_at(runner)) != warned


def test_scalars_reach_the_visualizer(tmp_path):
    runner = train(tmp_path, dict(ACTIVE, init='uniform'))
    lines = scalars_of(runner)
    assert [line['step'] for line in lines] == [0, 2, 4, 6]
    masks = [start(runner)['masks'], *(records(runner)[i]['masks'] for i in (1, 3, 5))]
    ever = {name: torch.zeros_like(mask) for name, mask in masks[0].items()}
    for i, line in enumerate(lines):
        for name, mask in masks[i].items():
            ever[name] |= mask
            assert line[f'sparse/density/{name}'] == int(mask.sum()) / mask.numel()
        assert line['sparse/density'] == KEPT / WEIGHTS
        assert line['sparse/nonzero'] == KEPT
        assert line['sparse/exploration_rate'] == sum(nonzeros(ever).values()) / WEIGHTS
        if i > 0:
            replaced = sum(int((masks[i][n] & ~m).sum()) for n, m in masks[i - 1].items())
            assert line['sparse/churn'] == pytest.approx(replaced / KEPT)
            assert line['sparse/prune_rate'] == 0.3
    assert lines[-1]['sparse/exploration_rate'] > KEPT / WEIGHTS


def test_the_log_says_counts_at_the_start_and_a_table_at_the_end(tmp_path):
    runner = train(tmp_path, dict(ACTIVE, init='uniform'))
    log = log_of(runner)
    assert f'4 tensors, {KEPT} of {WEIGHTS} weights active, density 0.5994' in log
    assert log.count('prune rate 0.3000') == 3
    table = log[log.index('Sparse training, by tensor:') :].splitlines()[1:7]
    assert table[0].split() == ['tensor', 'shape', 'non-zero', 'density', 'Rs']
    masks = hook_of(runner).masks
    for line, (name, count) in zip(table[1:], masks.nnz.items()):
        assert line.split()[:3] == [name, '×'.join(map(str, SHAPES[name])), str(count)]
    assert table[5].split()[:3] == ['all', str(KEPT), '0.5994']
