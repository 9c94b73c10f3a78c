"""A validation of two batches before training, so that a broken one shows at once."""

import contextlib
import difflib
import io
import logging
import time
from collections.abc import Iterator
from itertools import chain, islice

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, EMAHook, Hook
from mmengine.runner import Runner, ValLoop
from torch.utils.data import DataLoader

from mmslak.datasets.samples import BadSampleError, bare, innermost
from mmslak.engine.resilience.random_states import random_states_kept
from mmslak.errors import UserError
from mmslak.registry import HOOKS

CPU_BATCH = 4  # samples of a batch where there is no accelerator, whose memory could run out
RESIZING = ('Resize', 'Crop', 'Rescale', 'Pad')  # parts of the names of what changes sizes


class RehearsalError(UserError):
    """A validation that would end with an error; the message says how, and how to go on."""


@HOOKS.register_module()
class RehearsalHook(Hook):
    """Runs a few batches through the whole validation before the first iteration.

    Data, model, metric, and the names of scores that other hooks and schedulers wait for: what
    would stop the run at its first validation stops it now. Averaged weights (EMAHook) are used
    where they are in a validation. Random states, weights and counters are afterwards what they
    were before; no score is logged and no other hook takes part. A resumed run, a loop of another
    class than ValLoop and a data set of videos are not rehearsed.

    Args:
        batches: Batches of every rank.

    Raises:
        RehearsalError: In `before_train`, if the validation does not run.
    """

    priority = 'LOWEST'  # after everything else is set up

    def __init__(self, batches: int = 2) -> None:
        self.batches = batches

    def before_train(self, runner: Runner) -> None:
        """Rehearses."""
        loop = runner.val_loop
        if loop is None or runner.iter > 0 or runner._resume:
            return
        if type(loop) is not ValLoop or not _takes_samples(loop.dataloader):
            runner.logger.info('The validation is of a kind that is not rehearsed')
            return
        start, state = time.monotonic(), _Scores()
        loader = _first_batches(loop.dataloader, self.batches)
        try:
            with random_states_kept(), _instead(runner, loop, loader, state):
                loop.run()
        except RehearsalError:
            raise
        except BadSampleError as error:
            _agree(str(error), state)
            raise
        except Exception as error:  # data, models and metrics raise what they like
            text = _described(error, loop)
            _agree(text, state)
            raise RehearsalError(text) from error
        _check_names(runner, state.metrics)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = time.monotonic() - start
        runner.logger.info(
            f'Rehearsal of the validation: {len(loader)} batches ran in {seconds:.1f} s'
        )


class _Scores(Hook):
    """Takes the scores, and knows whether the ranks have told each other how the batches went."""

    def __init__(self) -> None:
        self.metrics: dict = {}
        self.agreed = False

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.metrics = metrics or {}


class _Head(torch.utils.data.Dataset):
    """A data set that is as long as what is taken of it on all ranks."""

    def __init__(self, dataset: object, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> object:
        return self.dataset[index]


class _Agreeing:
    """A loader at whose end the ranks tell each other whether all came so far."""

    def __init__(self, loader: DataLoader, state: _Scores) -> None:
        self.loader, self.dataset, self._state = loader, loader.dataset, state

    def __iter__(self) -> Iterator[object]:
        yield from self.loader
        elsewhere = _agree(None, self._state)
        if elsewhere:
            raise RehearsalError(elsewhere)


def _agree(error: str | None, state: _Scores) -> str | None:
    """Tells the other ranks, once, what went wrong with the batches; returns what did on any.

    Otherwise those that came to the metric would wait for the others for ever.
    """
    if state.agreed or get_world_size() == 1:
        return error
    state.agreed = True
    return next(filter(None, all_gather_object(error)), None)


def _takes_samples(loader: DataLoader) -> bool:
    dataset = loader.dataset
    videos = any(hasattr(inner, 'load_as_video') for inner in innermost(dataset))
    return hasattr(dataset, '__len__') and loader.batch_sampler is not None and not videos


def _first_batches(loader: DataLoader, count: int) -> DataLoader:
    """A loader of the first batches of another, without workers of its own."""
    batches = list(islice(loader.batch_sampler, count))
    if not torch.cuda.is_available():
        batches = [batch[:CPU_BATCH] for batch in batches]
    length = min(len(loader.dataset), sum(map(len, batches)) * get_world_size())
    return DataLoader(
        _Head(loader.dataset, length),
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


@contextlib.contextmanager
def _instead(runner: Runner, loop: ValLoop, loader: DataLoader, state: _Scores) -> Iterator[None]:
    """Gives the validation other data and no hooks but EMAHook, and keeps it quiet."""
    hooks, whole, training = runner._hooks, loop.dataloader, runner.model.training
    level = runner.logger.level
    runner._hooks = [hook for hook in hooks if isinstance(hook, EMAHook)] + [state]
    loop.dataloader = _Agreeing(loader, state)
    runner.logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        runner._hooks, loop.dataloader = hooks, whole
        runner.model.train(training)
        runner.logger.setLevel(level)


def _check_names(runner: Runner, metrics: dict) -> None:
    """Checks that the scores that something waits for are among those that the validation gives."""
    wanted = []
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            wanted += [('save_best', name) for name in hook.key_indicators if name != 'auto']
        if isinstance(hook, EarlyStoppingHook) and hook.strict:
            wanted.append(('EarlyStoppingHook.monitor', hook.monitor))
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = chain.from_iterable(schedulers.values())
    wanted += [
        (f'{type(scheduler).__name__}.monitor', scheduler.monitor)
        for scheduler in schedulers
        if getattr(scheduler, 'need_val_args', False)
    ]
    # Without a single detection there are no scores at all.
    missing = [(place, name) for place, name in wanted if metrics and name not in metrics]
    if missing:
        place, name = missing[0]
        nearest = difflib.get_close_matches(name, metrics, n=1, cutoff=0)[0]
        raise RehearsalError(
            f'{place}={name!r}: the validation gives no such score; the nearest is {nearest!r}, '
            f'and all are {", ".join(metrics)}'
        )


def _described(error: Exception, loop: ValLoop) -> str:
    text = ' '.join(str(error).split())
    swapped = _label_order(loop)
    hint = f'{swapped}; ' if swapped else ''
    return (
        f'the validation does not run: {type(error).__name__}: {text}; {hint}it was rehearsed '
        'before training; --no-rehearsal leaves that out'
    )


def _label_order(loop: ValLoop) -> str:
    """What to exchange, if a pipeline resizes label maps that the metric wants as they are."""
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
