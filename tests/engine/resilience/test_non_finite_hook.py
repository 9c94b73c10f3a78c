"""Training stops at the first non-finite number and names where it arose."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmslak.checkpoints.files import read_checkpoint
from mmslak.engine import NonFiniteError, NonFiniteHook
from mmslak.engine.resilience import non_finite_hook
from mmslak.models.slak import LargeKernelConv2d
from tests.engine.resilience.ranks import in_two_ranks
from tests.toy import Data, Toy, assert_same, build_runner, hook_of, load

HOOKS = [dict(type='mmslak.NonFiniteHook')]


class Spoil(nn.Module):
    """Finite until a batch holds the sample that is marked by large numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == 'forward':
            return x / (x.abs().amax() < 50)  # 1, or 0 in the marked batch
        if self.how == 'backward' and x.abs().amax() > 50:
            return x + torch.sqrt(x * 0)  # zero, of infinite slope
        return x


class Marked(Data):
    """Sample 13 is marked."""

    def __getitem__(self, index: int) -> dict:
        sample = super().__getitem__(index)
        if index == 13:
            sample['x'] = sample['x'] + 1000.0
        return sample


class Spoiled(Toy):
    """The toy with a module that spoils the marked batch, and a loss that can."""

    def __init__(self, how: str) -> None:
        super().__init__(norm=False)
        self.data_preprocessor = BaseDataPreprocessor()
        self.how = how
        self.spoil = Spoil(how)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        losses = super().forward(self.spoil(x * self.scale(x)), y, mode)
        if self.how == 'loss' and x.abs().amax() > 50:
            losses['loss'] = losses['loss'] + torch.log(x.new_zeros(()))
        return losses

    def scale(self, x: Tensor) -> Tensor:
        return self.stem.weight.mean() * 0 + 1  # so that the spoiling module has a gradient


def run(folder, how: str, **options):
    torch.manual_seed(0)
    options.setdefault('hooks', HOOKS)
    runner = build_runner(
        folder, model=Spoiled(how), data=Marked(16), shuffle=False, iters=6, save_every=1, **options
    )
    runner.train()
    return runner


@pytest.mark.parametrize(
    ('how', 'says'),
    [
        ('forward', 'non-finite loss in iteration 4'),
        ('backward', 'non-finite gradient in iteration 4'),
        ('loss', 'non-finite loss in iteration 4'),
    ],
)
def test_it_stops_before_the_step_and_names_the_module(tmp_path, how, says):
    with pytest.raises(NonFiniteError, match=says) as error:
        run(tmp_path, how)
    text = str(error.value)
    place = dict(forward='spoil (Spoil)', backward='backward pass of spoil (Spoil)', loss='loss')
    assert place[how] in text
    path = tmp_path / 'non_finite_rank0.pth'
    assert str(path) in text
    saved = read_checkpoint(path)
    assert saved['batch']['x'].shape == (4, 3, 8, 8)
    assert saved['batch']['x'].max() > 900
    assert_same(saved['state_dict'], load(tmp_path, 3)['state_dict'])  # the bad step was not taken
    assert_same(dict(saved['optimizer']), dict(load(tmp_path, 3)['optimizer']))


def test_the_saved_state_shows_it_again(tmp_path):
    with pytest.raises(NonFiniteError):
        run(tmp_path, 'backward')
    saved = read_checkpoint(tmp_path / 'non_finite_rank0.pth')
    model = Spoiled('backward')
    model.load_state_dict(saved['state_dict'])
    model(**saved['batch'], mode='loss')['loss'].backward()
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_finite_run_goes_through_and_is_left_alone(tmp_path):
    guarded = run(tmp_path / 'guarded', 'none')
    run(tmp_path / 'plain', 'none', hooks=[])
    assert guarded.iter == 6
    for key in ('state_dict', 'optimizer'):
        assert_same(load(tmp_path / 'guarded', 6)[key], load(tmp_path / 'plain', 6)[key], key)


class Overflow(Hook):
    """What a GradScaler does in an overflow: it calls no step, or a fused one with `found_inf`."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def before_train(self, runner) -> None:
        optimizer = runner.optim_wrapper.optimizer
        step = optimizer.step

        def skip(*args, **kwargs) -> None:
            if runner.iter == 2:
                for group in optimizer.param_groups:
                    for parameter in group['params']:
                        parameter.grad.fill_(torch.inf)
                if not self.fused:
                    return
                optimizer.found_inf = torch.tensor(1.0)
                for hook in optimizer._optimizer_step_pre_hooks.values():
                    hook(optimizer, (), {})
                del optimizer.found_inf
                return
            step(*args, **kwargs)

        optimizer.step = skip


CLIPS = [dict(type='value', clip_value=0.1), dict(max_norm=1)]


@pytest.mark.parametrize('clip', CLIPS, ids=['value', 'norm'])
def test_clipping_hides_nothing(tmp_path, clip):
    """Clipped to a value, infinity is a number."""
    model = Toy()
    model.head.bias.register_hook(lambda gradient: gradient / 0)
    runner = build_runner(tmp_path, model=model, wrapper=dict(clip_grad=clip), hooks=HOOKS)
    with pytest.raises(NonFiniteError, match=r'iteration 1: .* the gradient of head\.bias'):
        runner.train()


class Scaled(OptimWrapper):
    """Unscales, clips and skips as AmpOptimWrapper does, which needs a GPU."""

    loss_scaler = SimpleNamespace(is_enabled=lambda: True)
    skipped = 0

    def step(self, **kwargs) -> None:
        overflow = any(bool(p.grad.isinf().any()) for p in self.param_groups[0]['params'])
        self._clip_grad()
        if overflow:
            self.skipped += 1
        else:
            self.optimizer.step(**kwargs)


@pytest.mark.parametrize('clip', CLIPS, ids=['value', 'norm'])
def test_an_overflow_that_is_clipped_is_no_alarm(tmp_path, clip):
    model, steps = Toy(), itertools.count()
    model.head.bias.register_hook(lambda gradient: gradient / (next(steps) % 2))
    wrapper = dict(type=Scaled, clip_grad=clip)
    runner = build_runner(tmp_path, model=model, wrapper=wrapper, hooks=HOOKS, iters=4)
    runner.train()
    assert runner.optim_wrapper.skipped == 2


@pytest.mark.parametrize('fused', [False, True])
def test_an_overflow_of_the_scaler_is_no_alarm(tmp_path, fused):
    assert run(tmp_path, 'none', hooks=[*HOOKS, Overflow(fused)]).iter == 6


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    class Break(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            if runner.iter == 1:
                with torch.no_grad():
                    runner.model.mix.bias[0] = torch.nan

    with pytest.raises(NonFiniteError, match=r'iteration 2: weight mix\.bias is not finite'):
        run(tmp_path, 'none', hooks=[*HOOKS, Break()])


class Composed(BaseModel):
    """SLaK's kernels, and a head; not finite is what a kernel makes, or what no module does."""

    def __init__(self, how: str) -> None:
        super().__init__(data_preprocessor=dict(type='BaseDataPreprocessor'))
        self.how = how
        self.kernel = LargeKernelConv2d(3, 9, 3)
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        if how == 'strip':
            nn.init.constant_(self.kernel.vertical.conv.weight, 3e38)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict:
        x = self.kernel(x)
        if self.how == 'function':
            x = torch.log(x * 0)
        return dict(loss=nn.functional.cross_entropy(self.tail(x), y))


@pytest.mark.parametrize(
    ('how', 'place'),
    [
        ('strip', 'kernel.vertical.conv (DepthwiseConv2d)'),
        ('function', 'the forward of Composed, before tail (Sequential)'),
    ],
)
def test_what_is_computed_between_modules_is_placed(tmp_path, how, place):
    """The branches' convolutions are called because they are watched."""
    runner = build_runner(tmp_path, model=Composed(how), hooks=HOOKS)
    with pytest.raises(NonFiniteError, match=re.escape(f'it first arises in {place}')):
        runner.train()


class Wrapped(nn.Module):
    """Spoils what its only child computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 0


def test_a_module_with_children_is_named(tmp_path):
    model = Toy()
    model.norm = Wrapped()
    runner = build_runner(tmp_path, model=model, hooks=HOOKS)
    with pytest.raises(NonFiniteError, match=r'it first arises in norm \(Wrapped\)'):
        runner.train()


def test_the_repetition_leaves_statistics_as_they_were(tmp_path):
    class Broken(Toy):
        def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
            losses = super().forward(x, y, mode)
            return dict(loss=losses['loss'] / (self.norm.num_batches_tracked < 3))

    runner = build_runner(tmp_path, model=Broken(), hooks=HOOKS, save_every=1)
    with pytest.raises(NonFiniteError, match='iteration 3'):
        runner.train()
    norm = runner.model.norm
    assert norm.num_batches_tracked == 3
    before = load(tmp_path, 2)['state_dict']
    x = runner.model.strip(runner.model.stem(hook_of(runner, 'NonFiniteHook')._data['x']))
    expected = 0.9 * before['norm.running_mean'] + 0.1 * x.mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)
    saved = read_checkpoint(tmp_path / 'non_finite_rank0.pth')['state_dict']
    assert_same(dict(saved), dict(runner.model.state_dict()))


def test_accumulated_over_two_batches(tmp_path):
    with pytest.raises(NonFiniteError, match='iteration 4'):
        run(tmp_path, 'forward', wrapper=dict(accumulative_counts=2))


def test_one_rank_of_two_ends_both_with_its_batch_saved(tmp_path):
    """The other is at another collective by then: the repetition must not wait for it."""
    ended = in_two_ranks('non_finite', tmp_path)
    assert ended.statuses[0] == 2
    assert ended.statuses[1]
    said = [line for line in ended.output.splitlines() if line.startswith('error: ')]
    assert 'non-finite loss in iteration 3: it first arises outside of modules' in ' '.join(said)
    saved = read_checkpoint(tmp_path / 'non_finite_rank0.pth')
    assert saved['batch']['x'].shape == (4, 3, 8, 8)
    assert 'outside of modules' in saved['place']
    assert saved['state_dict']['norm.count'] == 3  # as before the repetition
    assert not (tmp_path / 'non_finite_rank1.pth').exists()


def test_batch_and_state_survive_a_repetition_that_fails(tmp_path, monkeypatch):
    def lost(*args) -> str:
        assert (tmp_path / 'non_finite_rank0.pth').is_file()
        raise RuntimeError('out of memory')

    monkeypatch.setattr(non_finite_hook, 'find_origin', lost)
    with pytest.raises(NonFiniteError, match='RuntimeError: out of memory; batch and state are in'):
        run(tmp_path, 'forward')
    assert read_checkpoint(tmp_path / 'non_finite_rank0.pth')['batch']['x'].max() > 900


class Fails(Hook):
    """An error in the third training step, after the update of the second."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 2:
            raise FloatingPointError('in a step')


def test_after_a_run_that_raised_nothing_listens(tmp_path):
    """As in a notebook, where training goes on by hand."""
    hooks = [Fails(), NonFiniteHook()]
    runner = build_runner(tmp_path, model=Spoiled('forward'), hooks=hooks, iters=6)
    with pytest.raises(FloatingPointError):
        runner.train()
    batch = dict(x=torch.full((1, 3, 8, 8), 1000.0), y=torch.zeros(1, dtype=torch.long))
    kept = hooks[1]._data
    runner.model.train_step(batch, runner.optim_wrapper)
    assert not torch.isfinite(runner.model.head.weight).all()  # as without the hook
    assert not list(tmp_path.glob('non_finite*'))
    assert hooks[1]._data is None
    assert kept is not None
    assert not runner.model._forward_hooks


def test_the_step_alone_after_a_run_that_raised(tmp_path):
    hooks = [Fails(), *HOOKS]
    clip = dict(clip_grad=dict(max_norm=1))
    runner = build_runner(tmp_path, model=Spoiled('none'), hooks=hooks, wrapper=clip, iters=6)
    with pytest.raises(FloatingPointError):
        runner.train()
    for parameter in runner.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    runner.optim_wrapper.step()
    runner.optim_wrapper.optimizer.step()
    assert not list(tmp_path.glob('non_finite*'))


def test_a_second_run_of_the_optimizer_has_its_own_alarm(tmp_path):
    """The first run's hook is still in its way, and says nothing."""
    first = build_runner(
        tmp_path / 'first', model=Spoiled('backward'), hooks=[Fails(), NonFiniteHook()], iters=6
    )
    with pytest.raises(FloatingPointError):
        first.train()
    second = build_runner(
        tmp_path / 'second', model=first.model, hooks=HOOKS, iters=6, data=Marked(16),
        shuffle=False, optim_wrapper=first.optim_wrapper,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match='gradient in iteration 4') as error:
        second.train()
    assert str(tmp_path / 'second/non_finite_rank0.pth') in str(error.value)
    assert not list((tmp_path / 'first').glob('non_finite*'))
    # Again, by the same hook.
    second.train_loop._iter = 0
    with pytest.raises(NonFiniteError, match=r'in iteration [1-6]:'):
        second.train()
    hook_of(second, 'NonFiniteHook')._release()
    hook_of(first, 'NonFiniteHook')._release()
    assert not second.optim_wrapper.optimizer._optimizer_step_pre_hooks


# ---------------------------------------------------------------- gradients that others have


class Embedded(Toy):
    """A table whose gradient is sparse, of which stock optimizers take steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1, sparse=True)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        found = super().forward(x, y, mode)
        factor = torch.log(self.table.weight.new_zeros(())) if self.spoilt else 1.0
        return dict(loss=found['loss'] + self.table(y).sum() * factor)

    spoilt = False


def test_sparse_gradients_are_looked_at(tmp_path):
    plain_sgd = dict(type='SGD', lr=0.1)
    runner = build_runner(
        tmp_path / 'fine', model=Embedded(), hooks=HOOKS, iters=3, optimizer=plain_sgd
    )
    runner.train()
    assert runner.iter == 3
    spoilt = Embedded()
    spoilt.spoilt = True
    options = dict(model=spoilt, hooks=HOOKS, iters=3, optimizer=plain_sgd)
    with pytest.raises(NonFiniteError, match='non-finite loss in iteration 1'):
        build_runner(tmp_path / 'spoilt', **options).train()


@pytest.mark.parametrize('fault', [ZeroDivisionError('a fault'), None])
def test_a_fault_of_the_check_stops_nothing(tmp_path, monkeypatch, fault):
    def broken(tensors: list) -> object:
        if fault:
            raise fault
        return 'nonsense'

    monkeypatch.setattr(non_finite_hook, 'all_finite', broken)
    runner = build_runner(tmp_path, model=Toy(), hooks=HOOKS, iters=3)
    runner.train()
    assert runner.iter == 3
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count('since the check ended with ZeroDivisionError: a fault') == (1 if fault else 0)
