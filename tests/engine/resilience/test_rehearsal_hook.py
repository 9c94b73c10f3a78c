"""A broken validation shows before the first iteration; one that works leaves no trace."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import ValLoop
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmslak.datasets.samples import BadSampleError
from mmslak.engine import RehearsalError
from tests.engine.resilience.ranks import in_two_ranks
from tests.toy import Data, Toy, assert_same, build_runner, hook_of, records


class Score(BaseMetric):
    """The mean, and on request an error of its own."""

    def __init__(self, fails: bool = False, empty: bool = False) -> None:
        super().__init__()
        self.fails, self.empty, self.sizes = fails, empty, []

    def process(self, data_batch: object, data_samples: list[dict]) -> None:
        self.results += [float(sample['score']) for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        self.sizes.append(len(results))
        print('a table of scores')
        if self.fails:
            raise KeyError('no such metric: mIuO')
        return {} if self.empty else {'val/score': sum(results) % 1}


class Scored(Toy):
    """Predictions that depend on random numbers, and on request an error."""

    def __init__(self, fails: Exception | None = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.fails = fails

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | list | Tensor:
        if mode == 'loss':
            return super().forward(x, y, mode)
        if self.fails:
            raise self.fails
        found = super().forward(x + torch.rand(1), y, 'tensor')
        return [BaseDataElement(score=part.mean()) for part in found]


class Broken(Data):
    """Its third sample cannot be loaded."""

    def __init__(self, error: Exception) -> None:
        super().__init__(8)
        self.error = error

    def __getitem__(self, index: int) -> dict:
        if index == 2:
            raise self.error
        return super().__getitem__(index)


class Validations(Hook):
    """Iterations after which a validation is seen by a user's own hook."""

    def __init__(self) -> None:
        self.seen, self.scores = [], []

    def before_val(self, runner) -> None:
        self.seen.append(runner.iter)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.scores.append(metrics)


def runner_of(folder: Path, *hooks: object, data: Data | None = None, **options):
    """Six iterations, validated after the third and the last."""
    metric = options.pop('metric', dict(type=Score))
    settings = dict(
        model=Scored(),
        iters=6,
        hooks=hooks,
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=3),
        val_cfg=dict(),
        val_evaluator=metric,
        val_dataloader=dict(
            batch_size=3, num_workers=0, dataset=data or Data(16),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
    )  # fmt: skip
    return build_runner(folder, **{**settings, **options})


HOOK = dict(type='mmslak.RehearsalHook')


def refused(folder: Path, *hooks: object, **options) -> str:
    runner = runner_of(folder, HOOK, *hooks, **options)
    with pytest.raises(RehearsalError) as caught:
        runner.train()
    assert runner.iter == 0
    assert records(runner) == []
    return str(caught.value)


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize('options', [
    dict(),
    dict(ema=True),
    dict(sparse=dict(sparsity=0.4, update_interval=2)),
    dict(hooks=(dict(type='mmslak.ExactResumeHook'),)),
    dict(
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        train_dataloader=dict(
            batch_size=4, num_workers=0, dataset=Data(12),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        ),
    ),
])  # fmt: skip
def test_a_run_is_the_same_with_and_without(tmp_path, options):
    options = dict(options)
    more, runs = options.pop('hooks', ()), {}
    for name, hooks in (('without', ()), ('with', (HOOK,))):
        own = Validations()
        runner = runner_of(tmp_path / name, own, *more, *hooks, **options)
        runner.train()
        runs[name] = runner, own, torch.get_rng_state()
    (one, seen, state), (other, seen_too, state_too) = runs.values()
    assert_same(records(one), records(other))
    assert (seen.seen, seen.scores) == (seen_too.seen, seen_too.scores)
    assert len(seen.scores) == len(seen.seen) > 0
    assert torch.equal(state, state_too)
    scores = [hub.message_hub.log_scalars['val/val/score'].data[0] for hub in (one, other)]
    assert (scores[0] == scores[1]).all()


def test_it_says_how_long_it_took_and_no_score(tmp_path, capfd):
    runner = runner_of(tmp_path, HOOK)
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert re.search(r'Rehearsal of the validation: 2 batches ran in \d+\.\d s', log)
    # Two batches of three on the rank, then twice all sixteen.
    (metric,) = runner.val_loop.evaluator.metrics
    assert metric.sizes == [6, 16, 16]
    assert capfd.readouterr().out.count('a table of scores') == 2
    assert len(runner.val_loop.dataloader.dataset) == 16


def test_averaged_weights_are_used_and_put_back(tmp_path):
    class Watched(Scored):
        used: list[str] = []

        def forward(self, x, y, mode='tensor'):
            if mode == 'predict':
                Watched.used.append('predict')
            return super().forward(x, y, mode)

    class Swaps(EMAHook):
        def _swap_ema_parameters(self) -> None:
            Watched.used.append('swap')
            super()._swap_ema_parameters()

    Watched.used.clear()
    runner = runner_of(tmp_path, Swaps(momentum=0.1), HOOK, model=Watched(), iters=1)
    runner.train_loop  # noqa: B018  built before the hook is called by itself
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner.call_hook('before_run')
    hook_of(runner, 'RehearsalHook').before_train(runner)
    assert Watched.used == ['swap', 'predict', 'predict', 'swap']


def test_a_resumed_run_skips_it(tmp_path):
    runner_of(tmp_path, save_every=3).train()
    broken = dict(model=Scored(RuntimeError('broken')), load_from=str(tmp_path / 'iter_6.pth'))
    cfg = dict(by_epoch=False, max_iters=8, val_begin=9)
    runner_of(tmp_path, HOOK, resume=True, train_cfg=cfg, **broken).train()


def test_no_validation_and_loops_of_others_are_left_alone(tmp_path):
    none = dict(val_cfg=None, val_evaluator=None, val_dataloader=None)
    runner_of(tmp_path / 'none', HOOK, train_cfg=dict(by_epoch=False, max_iters=1), **none).train()

    @LOOPS.register_module(force=True)
    class OwnLoop(ValLoop):
        pass

    runner_of(tmp_path / 'own', HOOK, val_cfg=dict(type='OwnLoop')).train()
    log = next((tmp_path / 'own').glob('*/*.log')).read_text()
    assert 'is of a kind that is not rehearsed' in log


def test_a_small_dataset_and_an_empty_score(tmp_path):
    best = dict(type='CheckpointHook', by_epoch=False, save_best='other', rule='less')
    settings = dict(metric=dict(type=Score, empty=True), data=Data(2), iters=1)
    settings['train_cfg'] = dict(by_epoch=False, max_iters=1, val_interval=5, val_begin=9)
    runner_of(tmp_path, HOOK, default_hooks=dict(checkpoint=best), **settings).train()


# ---------------------------------------------------------------- what does not


def test_data_that_cannot_be_loaded(tmp_path):
    said = refused(tmp_path, data=Broken(FileNotFoundError('ann/3.png')))
    assert said.startswith('the validation does not run: FileNotFoundError: ann/3.png; ')
    assert said.endswith('--no-rehearsal leaves that out')


def test_a_bad_sample_is_its_own_error(tmp_path):
    runner = runner_of(tmp_path, HOOK, data=Broken(BadSampleError('3.png: truncated')))
    with pytest.raises(BadSampleError, match=r'3\.png: truncated'):
        runner.train()


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory') if hasattr(torch, 'OutOfMemoryError')
    else torch.cuda.OutOfMemoryError('CUDA out of memory'),
    MemoryError(), RuntimeError('size mismatch'), IndexError(),
])  # fmt: skip
def test_a_model_that_does_not_predict(tmp_path, error):
    said = refused(tmp_path, model=Scored(error))
    assert said.startswith(f'the validation does not run: {type(error).__name__}: {error}')


def test_a_metric_that_cannot_compute(tmp_path):
    said = refused(tmp_path, metric=dict(type=Score, fails=True))
    assert "KeyError: 'no such metric: mIuO'" in said


def test_scores_that_nothing_gives(tmp_path):
    best = dict(type='CheckpointHook', by_epoch=False, save_best='val/scoer', rule='greater')
    said = refused(tmp_path / 'a', default_hooks=dict(checkpoint=best))
    assert said == (
        "save_best='val/scoer': the validation gives no such score; the nearest is 'val/score', "
        'and all are val/score'
    )
    stop = dict(type='EarlyStoppingHook', monitor='mIoU', strict=True)
    assert refused(tmp_path / 'b', stop).startswith("EarlyStoppingHook.monitor='mIoU': the val")
    plateau = dict(type='ReduceOnPlateauLR', monitor='mIoU', rule='greater', by_epoch=True)
    said = refused(tmp_path / 'c', param_scheduler=[plateau])
    assert said.startswith("ReduceOnPlateauLR.monitor='mIoU': the validation")


@pytest.mark.parametrize('rank', [0, 1])
def test_of_two_ranks_one_fails_and_both_end(tmp_path, rank):
    ended = in_two_ranks(f'rehearsal_{rank}', tmp_path)
    assert ended.statuses == [2, 2]
    assert 'error: the validation does not run: RuntimeError: only here' in ended.output


def test_two_ranks_rehearse(tmp_path):
    ended = in_two_ranks('rehearsal', tmp_path)
    assert ended.statuses == [0, 0], ended.output[-2000:]
    assert (tmp_path / 'iter_1.pth').exists()
