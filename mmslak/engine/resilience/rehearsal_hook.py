"""Rehearses the validation with two batches before training."""

import contextlib
import difflib
import io
import logging
import time
from collections.abc import Iterator
from itertools import islice

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, EMAHook, Hook
from mmengine.runner import Runner, ValLoop
from torch.utils.data import DataLoader

from mmslak.datasets.findings import of
from mmslak.datasets.guard import bare, innermost
from mmslak.datasets.samples import BadSampleError
from mmslak.engine.resilience.random_states import random_states_kept
from mmslak.engine.resilience.running import waiting_schedulers
from mmslak.errors import UserError
from mmslak.registry import HOOKS

CPU_BATCH = 4  # samples of a batch where there is no accelerator, whose memory could run out
RESIZING = ('Resize', 'Crop', 'Rescale', 'Pad')  # parts of the names of what changes sizes


class RehearsalError(UserError):
    """The validation would end with an error; the message says which, and how to go on."""


@HOOKS.register_module()
class RehearsalHook(Hook):
    """Runs a few batches through the whole validation before the first iteration.

    An error in data, model or metric, or a score that a hook or scheduler waits for in vain, stops
    the run now and not at its first validation. EMAHook puts in the averaged weights, as in a
    validation; no other hook takes part, and no score is logged. Random states, weights and
    counters stay as they were. A resumed run, a loop of another class than ValLoop and a data set
    of videos are not rehearsed.

    Args:
        batches: Batches of every rank.

    Raises:
        RehearsalError: In `before_train`, if the validation does not run.
    """

    priority = 'LOWEST'  # after everything else is set up

    def __init__(self, batches: int = 2) -> None:
        self.batches = batches

    def before_train(self, runner: Runner) -> None:
        """Runs the rehearsal."""
        loop = runner.val_loop
        if loop is None or runner.iter > 0 or runner._resume:
            return
        if type(loop) is not ValLoop or not _takes_samples(loop.dataloader):
            runner.logger.info('The validation is of a kind that is not rehearsed')
            return
        start = time.monotonic()
        loader = _FirstBatches(loop.dataloader, self.batches)
        try:
            with random_states_kept(), _quiet(runner):
                metrics = ValLoop(_EMAOnly(runner), loader, loop.evaluator, loop.fp16).run()
        except RehearsalError:
            raise
        except BadSampleError as error:
            loader.agree(str(error))
            raise
        except Exception as error:  # data, models and metrics raise what they like
            text = _describe(error, loop)
            loader.agree(text)
            raise RehearsalError(text) from error
        _check_names(runner, metrics)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = time.monotonic() - start
        runner.logger.info(
            f'Rehearsal of the validation: {of(len(loader), "batch")} ran in {seconds:.1f} s'
        )


class _Head(torch.utils.data.Dataset):
    """A data set that is as long as what is taken of it on all ranks."""

    def __init__(self, dataset: object, length: int) -> None:
        self.dataset, self.length = dataset, length
        if hasattr(dataset, 'metainfo'):
            self.metainfo = dataset.metainfo  # which ValLoop gives to metrics

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> object:
        return self.dataset[index]


class _FirstBatches:
    """The first batches of a loader, loaded without workers.

    At their end the ranks tell each other whether all came so far: those that came to the metric
    would wait for the others for ever.
    """

    def __init__(self, loader: DataLoader, count: int) -> None:
        batches = list(islice(loader.batch_sampler, count))
        if not torch.cuda.is_available():
            batches = [batch[:CPU_BATCH] for batch in batches]
        length = min(len(loader.dataset), sum(map(len, batches)) * get_world_size())
        self.dataset = _Head(loader.dataset, length)
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )
        self._agreed = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[object]:
        yield from self.loader
        elsewhere = self.agree(None)
        if elsewhere:
            raise RehearsalError(elsewhere)

    def agree(self, error: str | None) -> str | None:
        """Tells the other ranks, once, what went wrong here; returns what did on any of them."""
        if self._agreed or get_world_size() == 1:
            return error
        self._agreed = True
        return next(filter(None, all_gather_object(error)), None)


class _EMAOnly:
    """A runner for a loop of its own, in which no hook but EMAHook takes part."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def call_hook(self, event: str, **kwargs) -> None:
        for hook in self._hooks:
            getattr(hook, event)(self._runner, **kwargs)


def _takes_samples(loader: DataLoader) -> bool:
    dataset = loader.dataset
    videos = any(hasattr(inner, 'load_as_video') for inner in innermost(dataset))
    return hasattr(dataset, '__len__') and loader.batch_sampler is not None and not videos


@contextlib.contextmanager
def _quiet(runner: Runner) -> Iterator[None]:
    """No output but errors, and the model's mode as it was before."""
    level, training = runner.logger.level, runner.model.training
    runner.logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        runner.logger.setLevel(level)
        runner.model.train(training)


def _check_names(runner: Runner, metrics: dict) -> None:
    """Checks that the validation gives the scores that hooks and schedulers wait for."""
    wanted = []
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            wanted += [('save_best', name) for name in hook.key_indicators if name != 'auto']
        if isinstance(hook, EarlyStoppingHook) and hook.strict:
            wanted.append(('EarlyStoppingHook.monitor', hook.monitor))
    waiting = waiting_schedulers(runner)
    wanted += [(f'{type(scheduler).__name__}.monitor', scheduler.monitor) for scheduler in waiting]
    # Without a single detection there are no scores at all.
    missing = [(place, name) for place, name in wanted if metrics and name not in metrics]
    if missing:
        place, name = missing[0]
        nearest = difflib.get_close_matches(name, metrics, n=1, cutoff=0)[0]
        raise RehearsalError(
            f'{place}={name!r}: the validation gives no such score; the nearest is {nearest!r}, '
            f'and all are {", ".join(metrics)}'
        )


def _describe(error: Exception, loop: ValLoop) -> str:
    text = ' '.join(str(error).split())
    swapped = _label_order(loop)
    hint = f'{swapped}; ' if swapped else ''
    return (
        f'the validation does not run: {type(error).__name__}: {text}; {hint}it was rehearsed '
        'before training; --no-rehearsal leaves that out'
    )


def _label_order(loop: ValLoop) -> str:
    """Which two lines to exchange, if a pipeline resizes label maps after it has loaded them."""
    for dataset in innermost(loop.dataloader.dataset):
        names = [type(bare(t)).__name__ for t in getattr(dataset.pipeline, 'transforms', ())]
        loads = [i for i, name in enumerate(names) if name.startswith('Load') and 'Ann' in name]
        resizes = [i for i, name in enumerate(names) if any(part in name for part in RESIZING)]
        if loads and any(i > loads[0] for i in resizes):
            resize = names[next(i for i in resizes if i > loads[0])]
            return (
                f'in val_dataloader.dataset.pipeline {names[loads[0]]} stands before {resize}: '
                'exchange the two lines, since predictions are compared with labels of the '
                "picture's own size"
            )
    return ''
