"""What surviving costs: the hooks as a share of a training step, and the writing of a checkpoint.

Example:
    python benchmarks/survival.py --out benchmarks/results/MACHINE/survival_cpu.json

Trains a config on random pictures with the hooks that tools/train.py adds and times each of their
events inside of the run; a step is the median of the same run. Then it writes the same checkpoint
in turns with MMEngine's way and ours, which waits for the disk as MMEngine's does not, and reads
it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, save_checkpoint
from timing import environment, save
from torch.utils.data import Dataset

import mmslak  # noqa: F401
from mmslak.checkpoints.files import read_checkpoint
from mmslak.cli.runner import enable_survival
from mmslak.fileio.atomic import BACKEND

ROOT = Path(__file__).parents[1]
EVENTS = ('before_train_iter', 'after_train_iter')


class Pictures(Dataset):
    """Random pictures with random labels, as mmseg's pipeline gives them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        shape = (self.size, self.size)
        sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, *shape)))
        return dict(
            inputs=torch.randint(0, 256, (3, *shape), dtype=torch.uint8), data_samples=sample
        )


class Clock(Hook):
    """Times the events of other hooks, and whole iterations."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)
        self._start = 0.0

    def watch(self, hook: Hook, names: tuple[str, ...]) -> None:
        for name in names:
            if hasattr(hook, name):
                setattr(hook, name, self._timed(type(hook).__name__, getattr(hook, name)))

    def _timed(self, label: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._now[label] += time.perf_counter() - start

        return call

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        now = time.perf_counter()
        if self._start:
            self.spent['step'].append(now - self._start)
            for label in LABELS:
                self.spent[label].append(self._now[label])
        self._now.clear()
        self._start = time.perf_counter()


LABELS = ('BadSampleHook', 'ExactResumeHook', 'PreemptionHook', 'NonFiniteHook')


def steps(args: argparse.Namespace, folder: str) -> tuple[Runner, dict[str, float]]:
    """Trains; shares of a step by hook, and seconds of a step."""
    cfg = Config.fromfile(args.config)
    init_default_scope('mmseg')
    cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.size = (args.size, args.size)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    clock = Clock()
    survival = Config(dict(default_hooks=dict(checkpoint=None, visualization=None)))
    enable_survival(survival)
    runner = Runner(
        model,
        folder,
        train_dataloader=dict(
            batch_size=args.images,
            num_workers=0,
            dataset=Pictures(args.size),
            sampler=dict(type='InfiniteSampler'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=args.steps + 3),
        optim_wrapper=cfg.optim_wrapper,
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=[*survival.custom_hooks, clock],
        default_scope='mmseg',
        randomness=dict(seed=0),
    )
    for hook in runner.hooks:
        if type(hook).__name__ in LABELS:
            clock.watch(hook, (*EVENTS, '_before_step', '_keep'))
    from mmslak.engine.resilience import exact_resume_hook

    # Seeding each sample is not an event.
    seed = exact_resume_hook._seed
    exact_resume_hook._seed = clock._timed('ExactResumeHook', seed)
    runner.train()
    exact_resume_hook._seed = seed
    medians = {label: statistics.median(times[2:]) for label, times in clock.spent.items()}
    step = medians.pop('step')
    return runner, {label: spent / step for label, spent in medians.items()}, step


def writing(content: dict, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds of each way to write, in turns, and of reading."""
    times = defaultdict(list)
    ways = [('mmengine', None), ('mmslak', dict(backend=BACKEND))]
    for number in range(rounds):
        for name, backend in ways[:: -1 if number % 2 else 1]:
            # A new file each time, as in training: to overwrite one is another matter.
            path = folder / f'{name}_{number}.pth'
            os.sync()
            start = time.perf_counter()
            save_checkpoint(content, str(path), backend_args=backend)
            times[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    read_checkpoint(path)
    read = time.perf_counter() - start
    return {**{name: statistics.median(found) for name, found in times.items()}, 'read': read}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=str(ROOT / 'configs/upernet_slak_t_ade20k.py'))
    parser.add_argument('--size', type=int, default=256, help='side of the pictures')
    parser.add_argument('--images', type=int, default=2, help='pictures per step')
    parser.add_argument('--steps', type=int, default=5, help='steps to time')
    parser.add_argument('--rounds', type=int, default=6, help='checkpoints to write each way')
    parser.add_argument('--folder', help='where to write checkpoints [a temporary folder]')
    parser.add_argument('--out', help='JSON file to write')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        runner, shares, step = steps(args, folder)
        content = dict(
            state_dict=runner.model.state_dict(), optimizer=runner.optim_wrapper.state_dict()
        )
        times = writing(content, Path(folder), args.rounds)
        size = Path(folder, 'mmslak_0.pth').stat().st_size
    result = dict(
        model=Path(args.config).stem,
        shape=[args.images, 3, args.size, args.size],
        step_seconds=round(step, 3),
        share_of_step={label: round(share, 6) for label, share in shares.items()},
        share_of_step_together=round(sum(shares.values()), 6),
        checkpoint_megabytes=round(size / 1e6),
        write_seconds={name: round(times[name], 3) for name in ('mmengine', 'mmslak')},
        write_ratio=round(times['mmslak'] / times['mmengine'], 3),
        read_and_verify_seconds=round(times['read'], 3),
        timed_steps=args.steps,
        **environment('cuda' if torch.cuda.is_available() else 'cpu'),
    )
    print(json.dumps(result, indent=2))
    save(result, args.out)


if __name__ == '__main__':
    main()
