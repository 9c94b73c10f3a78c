"""A toy model, its data and its runner: what the tests of the training hooks train."""

import gc
import itertools
import json
import os
import signal
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmslak  # noqa: F401

SHAPES = {
    'stem.weight': (8, 3, 3, 3),
    'strip.weight': (8, 1, 9, 3),
    'mix.weight': (16, 8, 1, 1),
    'head.weight': (4, 16),
}
WEIGHTS = 216 + 216 + 128 + 64
KEPT = 374  # 60 % of them, to the nearest
SGD = dict(type='SGD', lr=0.1, momentum=0.9)
ADAMW = dict(type='AdamW', lr=1e-2, weight_decay=0.1)
_serial = itertools.count()


class Toy(BaseModel):
    """A classifier of the layers that SLaK has: stem, depthwise strip, norm, pointwise, head."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strip = nn.Conv2d(8, 8, (9, 3), padding=(4, 1), groups=8)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.mix = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 4)
        self.seen: list[list[int]] = []  # labels of the batches trained on

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        x = self.norm(self.strip(self.stem(x)))
        logits = self.head(torch.relu(self.mix(x)).mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


class Data(Dataset):
    """Noise with a class; every sample is a function of its index."""

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return dict(x=torch.randn(3, 8, 8, generator=generator), y=torch.tensor(index % 4))


class RepeatedBatches(Data):
    """Read in order, every batch comes `times` times in a row."""

    def __init__(self, batch_size: int, times: int) -> None:
        super().__init__(64 * times)
        self.batch_size, self.times = batch_size, times

    def __getitem__(self, index: int) -> dict:
        batch, place = divmod(index, self.batch_size)
        return super().__getitem__(batch // self.times * self.batch_size + place)


class Recorder(Hook):
    """Copies of everything that training moves, after every iteration: `records[0]` is iteration 1.

    Each is dict(step, masks, weights, ema, state); `start` is the same before the first iteration.
    """

    priority = 'LOWEST'  # after checkpoints

    def __init__(self) -> None:
        self.start: dict = {}
        self.records: list[dict] = []

    def before_train(self, runner: Runner) -> None:
        self.start = self._record(runner)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.records.append(self._record(runner))

    def _record(self, runner: Runner) -> dict:
        record = dict(weights=copies(parameters(runner)))
        for hook in runner.hooks:
            if type(hook).__name__ == 'SparseTrainingHook':
                record.update(step=hook.step, masks=copies(hook.masks.active))
            if type(hook).__name__ == 'EMAHook':
                record['ema'] = copies(dict(hook.ema_model.module.named_parameters()))
        state = runner.optim_wrapper.optimizer.state
        record['state'] = {
            name: copies({k: v for k, v in state.get(p, {}).items() if isinstance(v, Tensor)})
            for name, p in parameters(runner).items()
        }
        return record


class Kill(Hook):
    """Ends the process as a scheduler does, after an iteration and its checkpoint."""

    priority = 'LOWEST'

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


class ToyRunner(Runner):
    """Without the survey of the machine, which takes longer than the training."""

    def _log_env(self, env_cfg: dict) -> None:
        pass


def build_runner(
    work_dir: str | Path,
    sparse: dict | None = None,
    *,
    model: BaseModel | None = None,
    data: Dataset | None = None,
    iters: int = 8,
    batch_size: int = 4,
    shuffle: bool = True,
    optimizer: dict = SGD,
    wrapper: dict | None = None,
    ema: bool = False,
    save_every: int = -1,
    hooks: tuple | list = (),
    **options,
) -> Runner:
    """A runner of the toy, recording itself.

    Args:
        work_dir: Folder of logs and checkpoints.
        sparse: Arguments of SparseTrainingHook; None trains without it.
        model: Toy() of a fixed seed when None.
        data: Data() when None.
        iters: Iterations to train.
        batch_size: Samples in a batch.
        shuffle: Whether samples come in random order.
        optimizer: Config of the optimizer.
        wrapper: More of the optimizer wrapper's config.
        ema: Whether to average the weights.
        save_every: Interval of checkpoints in iterations; the last one is always saved.
        hooks: More hooks.
        options: Passed on to the Runner.
    """
    if model is None:
        torch.manual_seed(0)
        model = Toy()
    hooks = [*hooks, Recorder()]
    if sparse is not None:
        hooks.append(dict(type='mmslak.SparseTrainingHook', **sparse))
    if ema:
        hooks.append(dict(type='EMAHook', momentum=0.1))
    sampler = dict(type='InfiniteSampler', shuffle=shuffle)
    settings = dict(
        train_dataloader=dict(
            batch_size=batch_size,
            collate_fn=dict(type='default_collate'),
            dataset=data or Data(),
            sampler=sampler,
        ),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(optimizer), **(wrapper or {})),
        custom_hooks=hooks,
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=10**6),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=save_every),
        ),
        randomness=dict(seed=0),
        # Runners of one name share their log, and the default name is the second of the clock.
        experiment_name=f'toy_{os.getpid()}_{next(_serial)}',
    )
    return ToyRunner(model, str(work_dir), **{**settings, **options})


def train(work_dir: str | Path, sparse: dict | None = None, **options) -> Runner:
    """Builds a runner (`build_runner`) and trains."""
    runner = build_runner(work_dir, sparse, **options)
    runner.train()
    return runner


def hook_of(runner: Runner, kind: str = 'SparseTrainingHook') -> Hook:
    """The runner's only hook of that class."""
    (hook,) = (hook for hook in runner.hooks if type(hook).__name__ == kind)
    return hook


def records(runner: Runner) -> list[dict]:
    """What Recorder kept of every iteration."""
    return hook_of(runner, 'Recorder').records


def start(runner: Runner) -> dict:
    """What Recorder kept of the state before the first iteration."""
    return hook_of(runner, 'Recorder').start


def parameters(runner: Runner) -> dict[str, nn.Parameter]:
    """The model's parameters by their names without wrappers."""
    return dict(getattr(runner.model, 'module', runner.model).named_parameters())


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load(work_dir: str | Path, iteration: int) -> dict:
    """The checkpoint that was saved after an iteration."""
    return torch.load(Path(work_dir, f'iter_{iteration}.pth'), weights_only=False)


def assert_same(one: object, other: object, where: str = '') -> None:
    """Equal to the bit, through nested dicts and lists."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f'{where}/{key}')
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f'{where}/{i}')
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def main(work_dir: str, runs: str) -> None:
    """Trains in a process of its own: once for every element of the JSON list, in work_dir/0, ….

    `samples` is the size of the data, `kill_after` the iteration that the process does not outlive.
    Where there are several, the ranks have different seeds, in training and in their initial
    weights. They save what they end with as rank0.pth, rank1.pth, … in each run's folder.
    """
    rank, distributed = int(os.environ.get('RANK', 0)), 'RANK' in os.environ
    if distributed:
        torch.distributed.init_process_group('gloo')
    for i, options in enumerate(json.loads(runs)):
        folder = Path(work_dir, str(i))
        if distributed:
            wrapper = dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
            )
            torch.manual_seed(rank)
            options.update(
                model=Toy(),
                launcher='pytorch',
                randomness=dict(seed=0, diff_rank_seed=True),
                cfg=dict(model_wrapper_cfg=wrapper),
            )
        if 'samples' in options:
            options['data'] = Data(options.pop('samples'))
        if 'kill_after' in options:
            options['hooks'] = [Kill(options.pop('kill_after'))]
        runner = train(folder, **options)
        torch.save(records(runner), folder / f'rank{rank}.pth')
        del runner
        options.clear()
    if distributed:
        # While something still holds the group, such as DDP, gloo's threads can abort at the end.
        gc.collect()
        torch.distributed.destroy_process_group()
        os._exit(0)  # all is saved; how torch takes its threads down is not what is tested
