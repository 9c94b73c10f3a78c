"""A run that goes on from a checkpoint is, to the bit, the run that was not interrupted."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.schemes import load_without_code
from mmslak.engine import ExactResumeHook
from mmslak.ops import DepthwiseConv2d, tuner, tuning
from mmslak.ops.plans import Plan
from tests.toy import ADAMW, Data, Recorder, Toy, assert_same, build_runner
from tests.tuning_state import begin_anew

SURVIVAL = [dict(type='mmslak.ExactResumeHook')]
SPARSE = dict(update_interval=3, prune_rate=0.4)
STATE = ('state_dict', 'optimizer', 'sparse_training', 'param_schedulers', 'exact_resume')


class Augmented(Data):
    """Samples that depend on the random numbers of Python, NumPy and torch."""

    def __getitem__(self, index: int) -> dict:
        sample = super().__getitem__(index)
        sample['x'] = sample['x'] * random.uniform(0.5, 1.5) + np.random.normal(0, 0.5)
        sample['x'] = sample['x'] + torch.randn(3, 8, 8)
        return sample


class Dropped(Toy):
    """The toy with noise from three sources in its forward pass."""

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        x = nn.functional.dropout(x, 0.2, self.training) * random.uniform(0.9, 1.1)
        return super().forward(x + np.random.normal(0, 0.1), y, mode)


class Drawn(Hook):
    """Consumes random numbers in every validation, as a model in test mode may."""

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        torch.rand(3), np.random.rand(), random.random()


class Nothing(Hook):
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.numbers: list[int] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.numbers.append(batch_idx)
        self.seen.append(data_batch['x'].clone())


def run(work_dir: Path, by_epoch: bool, sampler: str, workers: int, persistent: bool = False,
        samples: int = 22, every: int = 1, more: list | None = None, **options):  # fmt: skip
    """Trains 14 iterations or 3 epochs, of up to 6 batches of 4; a checkpoint after each."""
    torch.manual_seed(0)
    loader = dict(
        batch_size=4,
        num_workers=workers,
        persistent_workers=persistent,
        collate_fn=dict(type='default_collate'),
        dataset=Augmented(samples),
        sampler=dict(type=sampler, shuffle=True),
    )
    seen = Nothing()
    settings = dict(
        model=Dropped(),
        optimizer=ADAMW,
        ema=True,
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch else dict(max_iters=14),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=14, by_epoch=False),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=10**6),
            checkpoint=dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=every),
        ),
        hooks=[*SURVIVAL, seen, *(more or [])],
    )
    if not by_epoch:
        settings['train_cfg']['by_epoch'] = False
    runner = build_runner(work_dir, SPARSE, **{**settings, **options})
    runner.train()
    return runner, seen


def last(folder: Path) -> dict:
    """The last checkpoint, read as the tools do."""
    return read_checkpoint((folder / 'last_checkpoint').read_text())


def assert_same_end(one: Path, other: Path) -> None:
    first, second = last(one), last(other)
    for key in STATE:
        assert_same(first[key], second[key], key)
    assert first['meta']['iter'] == second['meta']['iter']


@pytest.fixture(autouse=True)
def _safely():
    load_without_code()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(
    ('by_epoch', 'sampler'),
    [(False, 'InfiniteSampler'), (False, 'DefaultSampler'), (True, 'DefaultSampler')],
    ids=['iterations', 'iterations-of-passes', 'epochs'],
)
def test_resumed_anywhere_it_ends_the_same(tmp_path, by_epoch, sampler, workers):
    """In the first pass, at its end, in the middle of the second."""
    _, whole = run(tmp_path / 'whole', by_epoch, sampler, workers)
    total = len(whole.numbers)
    assert total == (18 if by_epoch else 14)
    for saved in (1, 6, 9) if workers == 0 else (9,):
        checkpoint = tmp_path / f'whole/iter_{saved}.pth'
        folder = tmp_path / str(saved)
        _, resumed = run(folder, by_epoch, sampler, workers, load_from=str(checkpoint), resume=True)
        assert resumed.numbers == whole.numbers[saved:]
        assert_same(resumed.seen, whole.seen[saved:])
        assert_same_end(folder, tmp_path / 'whole')


class LargeKernel(Dropped):
    """The toy with our operator as its strip."""

    def __init__(self) -> None:
        super().__init__()
        self.strip = DepthwiseConv2d(8, (9, 3))


def test_convolutions_go_on_by_the_same_methods(tmp_path, monkeypatch):
    """The second run has an empty cache, and would measure others to be fast."""

    def begin(method: str) -> None:
        begin_anew(monkeypatch, tmp_path / f'cache_{method}')
        monkeypatch.setattr(tuner, 'measure', lambda *_: Plan(*((method,),) * 3))

    with tuning('on'):
        begin('fft')
        run(tmp_path / 'whole', False, 'DefaultSampler', 0, model=LargeKernel())
        begin('toeplitz')
        run(tmp_path / 'other', False, 'DefaultSampler', 0, model=LargeKernel())
        begin('toeplitz')
        checkpoint = str(tmp_path / 'whole/iter_6.pth')
        options = dict(load_from=checkpoint, resume=True, model=LargeKernel())
        run(tmp_path / 'resumed', False, 'DefaultSampler', 0, **options)
    assert_same_end(tmp_path / 'resumed', tmp_path / 'whole')
    ends = [last(tmp_path / name)['state_dict'] for name in ('whole', 'other')]
    assert not torch.equal(*(end['strip.weight'] for end in ends))  # methods differ in bits


def test_the_number_of_workers_does_not_matter(tmp_path):
    """Nor whether they persist: what a sample looks like depends on its place alone."""
    _, alone = run(tmp_path / '0', True, 'DefaultSampler', 0)
    _, several = run(tmp_path / '2', True, 'DefaultSampler', 2, persistent=True)
    assert_same(alone.seen, several.seen)
    assert_same_end(tmp_path / '0', tmp_path / '2')


def test_passes_and_samples_differ(tmp_path):
    """Fixed seeds of workers would repeat an epoch's noise in the next."""
    _, drawn = run(tmp_path, True, 'DefaultSampler', 2, samples=4)
    noise = [batch - batch.mean() for batch in drawn.seen]
    assert len(noise) == 3
    assert not torch.equal(noise[0].sum(0), noise[1].sum(0))
    flat = torch.cat(drawn.seen)
    assert len({tuple(sample.flatten()[:3].tolist()) for sample in flat}) == len(flat)


def test_validation_leaves_no_trace(tmp_path):
    """A resumed run may have to repeat it."""
    options = dict(by_epoch=False, sampler='InfiniteSampler', workers=0)
    validated = dict(validation(), train_cfg=dict(by_epoch=False, max_iters=14, val_interval=3))
    _, whole = run(tmp_path / 'val', more=[Drawn()], model=Evaluated(), **options, **validated)
    _, plain = run(tmp_path / 'no', model=Evaluated(), **options)
    assert_same(whole.seen, plain.seen)
    assert_same_end(tmp_path / 'val', tmp_path / 'no')


def validation() -> dict:
    """Of the runner: two batches."""
    loader = dict(
        batch_size=2, num_workers=0, dataset=Data(4), sampler=dict(type='DefaultSampler'),
        collate_fn=dict(type='default_collate'),
    )  # fmt: skip
    return dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type=Score))


class Evaluated(Dropped):
    """Its predictions depend on weights and on random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | list | Tensor:
        found = super().forward(x, y, 'tensor' if mode == 'predict' else mode)
        return [BaseDataElement(score=found.mean())] if mode == 'predict' else found


class Score(BaseMetric):
    def process(self, data_batch: object, data_samples: list[dict]) -> None:
        self.results += [float(sample['score']) for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        return dict(score=1000 * sum(results) % 1)  # up and down


class Kept(Hook):
    """Keeps what a run leaves that is killed in a validation; counts validations."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def before_val(self, runner) -> None:
        self.validated.append(runner.iter)
        path = Path(runner.work_dir, 'last_checkpoint')
        if path.exists():
            shutil.copy(path.read_text(), path.with_name(f'killed_{runner.iter}.pth'))


PLATEAU = dict(
    type='ReduceOnPlateauLR', monitor='score', rule='greater', factor=0.5, patience=0
)  # fmt: skip
BEST = dict(save_best='score', rule='greater')


def run_with_scores(folder: Path, by_epoch: bool, what: str, patience: int = 2, **options):
    """Validates after each of 4 epochs, or after 3, 6, 9, 12 and 14 iterations."""
    kept, stop = Kept(), dict(type='EarlyStoppingHook', monitor='score', rule='greater')
    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=by_epoch, interval=1)
    if what == 'best':
        checkpoint.update(BEST)
    cfg = dict(by_epoch=True, max_epochs=4) if by_epoch else dict(by_epoch=False, max_iters=14)
    cfg['dynamic_intervals' if by_epoch else 'val_interval'] = [(0, 1)] if by_epoch else 3
    runner, seen = run(
        folder,
        by_epoch,
        'DefaultSampler' if by_epoch else 'InfiniteSampler',
        0,
        samples=10,
        model=Evaluated(),
        train_cfg=cfg,
        param_scheduler=PLATEAU if what == 'plateau' else None,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=10**6), checkpoint=checkpoint),
        more=[kept, *([dict(stop, patience=patience)] if what == 'stop' else [])],
        **validation(),
        **options,
    )
    return runner, seen, kept.validated


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iterations', 'epochs'])
@pytest.mark.parametrize('what', ['plateau', 'best', 'stop'])
def test_what_waits_for_a_score_gets_each_once(tmp_path, by_epoch, what):
    """Killed between a checkpoint and the end of the validation after it, or later."""
    runner, whole, validated = run_with_scores(tmp_path / 'whole', by_epoch, what)
    name = 'epoch_{}.pth' if by_epoch else 'iter_{}.pth'
    moments = {done // 3 if by_epoch else done: done for done in validated}
    for place, done in moments.items():
        for file in (f'killed_{done}.pth', name.format(place)):
            folder = tmp_path / f'{file}_resumed'
            checkpoint = tmp_path / 'whole' / file
            state = read_checkpoint(checkpoint)['exact_resume']
            resumed, seen, again = run_with_scores(
                folder, by_epoch, what, load_from=str(checkpoint), resume=True
            )
            assert again == [i for i in validated if i >= done + state['validated']]
            assert_same(seen.seen, whole.seen[done:])
            assert resumed.iter == runner.iter
            assert_same(state_of(resumed), state_of(runner))


def test_a_validation_on_which_nothing_depends_is_not_repeated(tmp_path, logged):
    run_with_scores(tmp_path / 'whole', False, 'nothing')
    for file, times in (('killed_9.pth', 1), ('iter_8.pth', 0)):
        logged.clear()
        checkpoint = str(tmp_path / 'whole' / file)
        on = run_with_scores(tmp_path / file, False, '', load_from=checkpoint, resume=True)
        assert on[2] == ([12, 14] if times else [9, 12, 14])
        assert sum('is not repeated' in text for text in logged) == times


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(MMLogger, 'info', lambda self, text, *args: said.append(str(text)))
    return said


def state_of(runner) -> dict:
    info = runner.message_hub.runtime_info
    return dict(
        model=runner.model.state_dict(),
        optimizer=runner.optim_wrapper.state_dict(),
        schedulers=[scheduler.state_dict() for scheduler in runner.param_schedulers or []],
        stopped=[h.wait_count for h in runner.hooks if hasattr(h, 'wait_count')],
        best=info.get('best_score'),
        file=Path(info.get('best_ckpt', '')).name,
    )


def test_accumulated_gradients_go_on(tmp_path):
    """Between two steps of the optimizer, too."""
    options = dict(by_epoch=False, sampler='InfiniteSampler', workers=0)
    options['wrapper'] = dict(accumulative_counts=3)
    run(tmp_path / 'whole', **options)
    run(tmp_path / 'on', load_from=str(tmp_path / 'whole/iter_7.pth'), resume=True, **options)
    assert_same_end(tmp_path / 'on', tmp_path / 'whole')


class Alternating(Toy):
    """Trained by two optimizers, of which one accumulates."""

    def train_step(self, data: dict, optim_wrapper: OptimWrapperDict) -> dict:
        loss = self(**data, mode='loss')['loss']
        for wrapper in optim_wrapper.values():
            wrapper._inner_count += 1
        (loss / 3).backward()
        for wrapper in optim_wrapper.values():
            if wrapper.should_update():
                wrapper.step()
                wrapper.zero_grad()
        return dict(loss=loss)


def test_accumulated_gradients_of_several_optimizers_go_on(tmp_path):
    ends = []
    for saved in (None, 4, 6):
        torch.manual_seed(0)
        model = Alternating()
        halves = [*model.stem.parameters()], [*model.mix.parameters(), *model.head.parameters()]
        wrappers = {
            name: OptimWrapper(torch.optim.SGD(part, lr=0.1), accumulative_counts=counts)
            for name, part, counts in zip('ab', halves, (3, 1))
        }
        resume = dict(load_from=str(tmp_path / f'None/iter_{saved}.pth'), resume=True)
        runner = build_runner(
            tmp_path / str(saved),
            model=model,
            hooks=SURVIVAL,
            optim_wrapper=OptimWrapperDict(**wrappers),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=10**6),
                checkpoint=dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=1),
            ),
            **(resume if saved else {}),
        )
        runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, Recorder)]
        runner.train()
        ends.append(model.state_dict())
    assert_same(dict(ends[1]), dict(ends[0]))
    assert_same(dict(ends[2]), dict(ends[0]))


def test_without_a_seed_in_the_config(tmp_path):
    """The seed was chosen at random; the resumed run takes it over."""
    options = dict(by_epoch=False, sampler='InfiniteSampler', workers=0, randomness=dict(seed=None))
    _, whole = run(tmp_path / 'whole', **options)
    checkpoint = str(tmp_path / 'whole/iter_5.pth')
    _, on = run(tmp_path / 'on', load_from=checkpoint, resume=True, **options)
    assert_same(on.seen, whole.seen[5:])


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    said = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *args: said.append(str(text)))
    return lambda: [text for text in said if 'not the same' in text]


def test_it_says_once_what_it_cannot_restore(tmp_path, warnings):
    options = dict(by_epoch=False, sampler='InfiniteSampler', workers=0)
    run(tmp_path / 'first', **options)
    assert warnings() == []
    checkpoint = read_checkpoint(tmp_path / 'first/iter_5.pth')
    checkpoint['exact_resume']['world_size'] = 4
    torch.save(checkpoint, tmp_path / 'four.pth')
    run(tmp_path / 'four', load_from=str(tmp_path / 'four.pth'), resume=True, **options)
    (text,) = warnings()
    assert 'by 4 processes before, and by 1 now' in text
    del checkpoint['exact_resume']
    torch.save(checkpoint, tmp_path / 'plain.pth')
    _, on = run(tmp_path / 'plain', load_from=str(tmp_path / 'plain.pth'), resume=True, **options)
    assert 'no random states' in warnings()[-1]
    assert len(on.numbers) == 9


def test_datasets_stay_what_they_are(tmp_path):
    """No wrapper: hooks that look at, or change, the dataset find it."""
    runner, _ = run(tmp_path, False, 'InfiniteSampler', 0)
    assert type(runner.train_dataloader.dataset) is Augmented
    assert not issubclass(BaseDataset, Augmented)
    assert runner.train_dataloader.batch_sampler.batch_size == 4


def test_states_are_tensors_and_plain_values(tmp_path):
    run(tmp_path, False, 'InfiniteSampler', 0)
    state = read_checkpoint(tmp_path / 'iter_14.pth')['exact_resume']
    torch.save(state, tmp_path / 'state.pth')
    assert_same(torch.load(tmp_path / 'state.pth', weights_only=True), state)


class Sized(Augmented):
    """Every third picture is upright."""

    def get_data_info(self, index: int) -> dict:
        return dict(width=8, height=9 if index % 3 == 0 else 8)


@pytest.mark.parametrize('name', ['AspectRatioBatchSampler', 'MultiDataAspectRatioBatchSampler'])
def test_half_filled_batches_are_emptied(name):
    """mmdet's batch samplers keep them, and loops of MMEngine 0.10 draw ahead when built."""
    samplers = pytest.importorskip('mmdet.datasets.samplers')
    if not hasattr(samplers, name):
        pytest.skip(f'this mmdet has no {name}')
    data = Sized(22)
    data.get_dataset_source = lambda index: 0
    sampler = DefaultSampler(data, shuffle=False)
    sampler.dataset = data
    more = dict(batch_size=[4], num_datasets=1) if 'Multi' in name else dict(batch_size=4)
    batches = getattr(samplers, name)(sampler, **more)
    first = next(iter(batches))
    ExactResumeHook()._rewind(None, batches)  # the runner is there for warnings
    assert next(iter(batches)) == first
