"""Checks of samples while they are loaded."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmengine.dataset import InfiniteSampler
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator

from mmslak.datasets.findings import of
from mmslak.datasets.guard import guard
from mmslak.datasets.sample_list import LIST_LIMIT, SampleList
from mmslak.datasets.samples import MEND, SKIP, BadSampleError
from mmslak.registry import HOOKS

BAD_LIST, ODD_LIST = 'bad_samples.jsonl', 'odd_samples.jsonl'
POLICIES = ('error', 'skip', 'warn')
FEW = 5  # samples that 'skip' may leave out of a small data set, where a fraction allows none


@HOOKS.register_module()
class BadSampleHook(Hook):
    """Checks samples while they are loaded.

    A sample is bad if it cannot be read or would teach wrong labels: a file is missing, unreadable
    or truncated; a label map has another size than its picture, is in colour or has an unknown
    class; a box is not finite, empty or turned around; the EXIF orientation turns the picture but
    not its boxes. A sample is odd if it is unusual and can be trained on: alpha, 16 bits, grey,
    CMYK, EXIF orientation, another size than stated, boxes beyond the border or below a pixel. The
    log names each kind of odd sample once, with its first file, and their number at the end;
    `odd_samples.jsonl` in the work folder lists them.

    Args:
        policy: What happens at a bad sample. 'error' stops training. 'skip' lets the dataset draw
            another sample, lists the bad one in `bad_samples.jsonl`, and stops when there are too
            many; samples of validation are never skipped. 'warn' treats it as an odd one, and stops
            only if the loader itself cannot read it.
        max_fraction: Fraction of the training samples that 'skip' may leave out. Five may be left
            out in any case, but at most half of the samples then.

    Raises:
        ValueError: On another policy, or a fraction out of [0, 1].
    """

    priority = 'VERY_HIGH'  # before anything reads data

    def __init__(self, policy: str = 'error', max_fraction: float = 0.01) -> None:
        if policy not in POLICIES:
            raise ValueError(f'policy: expected one of {", ".join(POLICIES)}, got {policy!r}')
        if not 0 <= max_fraction <= 1:
            raise ValueError(f'max_fraction: expected a number in [0, 1], got {max_fraction!r}')
        self.policy, self.max_fraction = policy, max_fraction

    def before_run(self, runner: Runner) -> None:
        """Adds a hook that runs after those that change pipelines."""
        if not any(isinstance(hook, _GuardAgain) for hook in runner.hooks):
            runner.register_hook(_GuardAgain(self))

    def before_train(self, runner: Runner) -> None:
        """Puts the checks into the datasets."""
        self._bad = SampleList(Path(runner.work_dir, BAD_LIST))
        self._odd = SampleList(Path(runner.work_dir, ODD_LIST), LIST_LIMIT)
        if runner.iter == 0 and is_main_process():
            self._bad.path.unlink(missing_ok=True)
            self._odd.path.unlink(missing_ok=True)
        barrier()
        self._skipped, self._named = self._bad.count(), set(self._odd.read())
        self._guard(runner)
        self._restart(runner)
        if runner.val_loop is not None:
            stop = _stop_validation
            on_bad = partial(self._warn, stop) if self.policy == 'warn' else stop
            guard(runner.val_loop.dataloader.dataset, on_bad, self._note)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Logs what was found.

        Raises:
            BadSampleError: If too many samples were skipped.
        """
        self._log_odd(runner)
        if self.policy != 'skip':
            return
        count = self._bad.count()
        if count > self._skipped:
            self._skipped = count
            runner.logger.warning(
                f'{of(count, "bad sample")} of {self._total} skipped so far, listed in '
                f'{self._bad.path}'
            )
        few = min(FEW, self._total // 2)
        if count > max(few, self.max_fraction * self._total):
            raise BadSampleError(
                f'{self._bad.path}: {count} of {of(self._total, "training sample")} cannot be '
                f'trained on, more than {few} and more than {100 * self.max_fraction:g} %; repair '
                'them, then remove this list'
            )

    def after_val_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Logs what was found."""
        if hasattr(self, '_odd'):  # not in a run that only validates
            self._log_odd(runner)

    def after_train(self, runner: Runner) -> None:
        """Logs how many odd samples of each kind there were."""
        for reason, files in self._odd.read().items():
            count = of(len(files), 'odd sample')
            runner.logger.warning(f'{count}: {reason}; first: {_first(files)}')

    def _log_odd(self, runner: Runner) -> None:
        """Logs each kind of odd sample once."""
        found = self._odd.read()
        for reason in [reason for reason in found if reason not in self._named]:
            self._named.add(reason)
            runner.logger.warning(
                f'odd, and used as it is loaded: {_first(found[reason])}: {reason}; further ones '
                f'are counted at the end and listed in {self._odd.path}'
            )

    def _guard(self, runner: Runner) -> None:
        warn = partial(self._warn, _stop_training)
        on_bad = dict(error=_stop_training, skip=self._skip, warn=warn)[self.policy]
        self._total = guard(runner.train_dataloader.dataset, on_bad, self._note)

    def _restart(self, runner: Runner) -> None:
        """Starts the workers of an iteration-based loop anew, with the checks in their datasets.

        MMEngine 0.10 starts them when it builds the loop, and has no event before that.
        """
        loop = runner.train_loop
        started = getattr(loop, 'dataloader_iterator', None)
        if not isinstance(started, _InfiniteDataloaderIterator) or not loop.dataloader.num_workers:
            return
        loop.dataloader._iterator = None  # persistent workers would go on
        sampler = getattr(loop.dataloader.batch_sampler, 'sampler', None)
        if isinstance(sampler, InfiniteSampler):
            sampler.indices = sampler._indices_of_rank()
        loop.dataloader_iterator = type(started)(loop.dataloader)

    def _note(self, file: str, reason: str) -> None:
        with contextlib.suppress(OSError):  # a full disk stops the run at its checkpoints
            self._odd.add(file, reason)

    def _skip(self, file: str, reason: str, loads: bool) -> bool:
        self._bad.add(file, reason)
        return False

    def _warn(self, stop: Callable, file: str, reason: str, loads: bool) -> bool:
        if not loads:
            stop(file, reason, loads)
        self._note(f'{file} ({reason})', 'bad, and used all the same')
        return True


class _GuardAgain(Hook):
    """Puts the checks into a pipeline that another hook has set, as mmdet's PipelineSwitchHook.

    Before the loader's workers of the epoch begin, hence not in `before_train_iter`.
    """

    priority = 'VERY_LOW'  # after those hooks

    def __init__(self, hook: BadSampleHook) -> None:
        self._hook = hook

    def before_train_epoch(self, runner: Runner) -> None:
        self._hook._guard(runner)


def _first(files: dict[str, None]) -> str:
    return next(iter(files))


def _stop_training(file: str, reason: str, loads: bool) -> bool:
    raise BadSampleError(f'{file}: {reason}; {MEND} and go on with --resume, {SKIP}')


def _stop_validation(file: str, reason: str, loads: bool) -> bool:
    raise BadSampleError(f'{file}: {reason}; {MEND} and go on with --resume')
