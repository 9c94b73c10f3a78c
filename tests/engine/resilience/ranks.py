"""What two ranks do: `in_two_ranks(case, folder)` calls `main` in each."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmslak.cli.parser import one_line_errors
from tests import forks, toy

WRITING = 0.5  # seconds, in which the other rank would end if it did not wait


def in_two_ranks(case: str, folder: Path) -> forks.Ended:
    """A case of `CASES` in each of two ranks; its exit status is not checked."""
    return forks.in_two_ranks(main, [case, str(folder)])


class Signals(Hook):
    """Sends SIGTERM to its process in iteration 3, that many seconds after its begin."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = seconds

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 2:
            start = time.monotonic()
            for second in self.seconds:
                time.sleep(max(0, start + second - time.monotonic()))
                os.kill(os.getpid(), signal.SIGTERM)


def train(build_runner, folder: Path, hooks: list, **options) -> None:
    """Six iterations of the toy with checkpoints that only hooks ask for."""
    logger = dict(type='LoggerHook', interval=10**6)
    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=1000)
    default = dict(logger=logger, checkpoint=checkpoint)
    build_runner(folder, hooks=hooks, default_hooks=default, iters=6, **options).train()


def preemption(folder: Path, **options) -> None:
    """The second rank alone gets a signal; the first, which writes, takes its time."""
    save = torch.save

    def slowly(*args, **kwargs) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who is told to end now, ends
        time.sleep(WRITING)
        save(*args, **kwargs)

    torch.save = slowly
    signals = [Signals(0)] if os.environ['RANK'] == '1' else []
    train(toy.build_runner, folder, [*signals, dict(type='mmslak.PreemptionHook')], **options)


class Met(nn.Module):
    """Waits for all ranks, as SyncBatchNorm does, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('count', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        mean = x.detach().mean()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
        return x - mean


def non_finite(folder: Path, **options) -> None:
    """The loss of the first rank alone is not finite, in iteration 3."""

    class Spoiled(toy.Toy):
        def __init__(self) -> None:
            super().__init__(norm=False)
            self.norm = Met()
            self.data_preprocessor = BaseDataPreprocessor()

        def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
            losses = super().forward(x, y, mode)
            spoil = os.environ['RANK'] == '0' and self.norm.count >= 3
            return dict(loss=losses['loss'] / (0 if spoil else 1)) if mode == 'loss' else losses

    train(toy.build_runner, folder, [dict(type='mmslak.NonFiniteHook')], model=Spoiled(), **options)


class Count(BaseMetric):
    """How many samples of all ranks there were."""

    def process(self, data_batch: object, data_samples: list[dict]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list) -> dict:
        return dict(count=len(results))


def rehearsal(folder: Path, fails: int | None = None, **options) -> None:
    """One rank's predictions fail, or none's."""

    class Predicting(toy.Toy):
        def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | list | Tensor:
            if mode == 'predict' and os.environ['RANK'] == str(fails):
                raise RuntimeError('only here')
            found = super().forward(x, y, mode)
            return [BaseDataElement(score=x.mean()) for x in found] if mode == 'predict' else found

    loader = dict(
        batch_size=3,
        num_workers=0,
        dataset=toy.Data(16),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    toy.build_runner(
        folder,
        hooks=[dict(type='mmslak.RehearsalHook')],
        model=Predicting(),
        train_cfg=dict(by_epoch=False, max_iters=1, val_interval=1),
        val_cfg=dict(),
        val_dataloader=loader,
        val_evaluator=dict(type=Count),
        **options,
    ).train()


CASES = dict(
    preemption=preemption,
    non_finite=non_finite,
    rehearsal=rehearsal,
    rehearsal_0=partial(rehearsal, fails=0),
    rehearsal_1=partial(rehearsal, fails=1),
)


@one_line_errors
def main(argv: list[str]) -> None:
    case, folder = argv
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    CASES[case](Path(folder), launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
