"""A run that gets a signal to stop saves a checkpoint first."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType

import torch
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader, get_worker_info

from mmslak.engine.resilience.running import is_running
from mmslak.engine.resilience.safe_checkpoint_hook import SafeCheckpointHook
from mmslak.engine.resilience.signal_watch import SignalWatch
from mmslak.errors import Interrupted
from mmslak.fileio.per_machine import is_first_of_machine
from mmslak.registry import HOOKS

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which signals are one. Ctrl-C reaches a process from the terminal, and from torchrun
# once more.
ONE_SIGNAL = 3.0


def _end_by_sigterm() -> None:
    """Restores, in a forked process, what a SIGTERM did before this hook.

    Python runs no handler in a process that starts to wait just when the signal comes. Pools such
    as that of mmdet's VOC metric would wait for such a process for ever.
    """
    own = handler = signal.getsignal(signal.SIGTERM)
    while isinstance(getattr(handler, '__self__', None), PreemptionHook):
        handler = handler.__self__._before[signal.SIGTERM]
    if handler is not own:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(-1)  # its signals are none of the process that watches the pipe


def _say(number: int) -> None:
    """Tells that a signal was seen; a step can take minutes."""
    line = (
        f'{signal.Signals(number).name}: finishing this step, then saving; once more after '
        f'{ONE_SIGNAL:g} seconds to stop at once\n'
    )
    # Not by a logger or a stream, whose locks the interrupted code may hold.
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


@functools.cache
def _watch_forks() -> None:
    """Registers what every forked process begins with; once, since it cannot be taken back."""
    os.register_at_fork(after_in_child=_end_by_sigterm)


def _begin_worker(begin: Callable[[int], None] | None, number: int) -> None:
    """Moves a data worker into a process group of its own.

    torchrun and terminals send signals to the group of the training process, which needs its
    workers while it finishes the iteration. Workers notice by themselves when it has ended.
    """
    os.setpgid(0, 0)
    if begin is not None:
        begin(number)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM or SIGINT finishes the iteration, saves a checkpoint, and ends the run.

    The first process of a machine says so at once on the standard error output, even inside of one
    long call of torch. A second signal ends the run at once, unless it comes within three seconds
    of the first. With several processes the signal may reach only some of them: all stop after the
    iteration in which the first one has seen it, and none ends before the checkpoint is written,
    because launchers then end the others.
    During validation a single process stops after the batch, several stop after the validation.
    After the last iteration the run ends as usual. `Interrupted` is raised, which commands turn
    into the exit status (143 or 130).

    Data workers leave the process group, so that a signal to the group does not end them. The
    workers of iteration-based loops start before any hook is called; ExactResumeHook, used beside
    this hook, starts them anew.

    A signal that comes after training has raised an exception goes to the previous handler, which
    is then restored.
    """

    # After the regular checkpoint, and before ExactResumeHook, which may begin with a validation.
    priority = 95

    def __init__(self) -> None:
        self._signal = 0
        self._first: float | None = None  # when the handler saw one, by the monotonic clock
        self._said = False  # that a signal was seen
        self._watch: SignalWatch | None = None
        self._before: dict[int, object] = {}  # the previous handlers, while this one listens

    def before_train(self, runner: Runner) -> None:
        """Installs the signal handlers, and moves data workers into groups of their own."""
        self._signal, self._first, self._process = 0, None, os.getpid()
        self._said = False
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            begin = getattr(loop.dataloader, 'worker_init_fn', None)
            is_own = getattr(begin, 'func', None) is _begin_worker
            if isinstance(loop.dataloader, DataLoader) and not is_own:
                loop.dataloader.worker_init_fn = functools.partial(_begin_worker, begin)
        _watch_forks()
        self._loop = weakref.ref(runner.train_loop)  # handlers outlive a run that has failed
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread only
        for number in SIGNALS:
            before = signal.signal(number, self._on_signal)
            if before != self._on_signal:  # it is, if training has raised before
                self._before[number] = before or signal.SIG_DFL  # None: not one of Python's
        self._watch = self._watch or SignalWatch(self._on_seen)

    def _on_seen(self, number: int) -> None:
        """Says so before the handler can, unless the signal is for another one."""
        is_ours = signal.getsignal(number) == self._on_signal
        frame = sys._current_frames().get(threading.main_thread().ident)
        if is_ours and is_running(self._loop(), frame):
            self._say_once(number)

    def _say_once(self, number: int) -> None:
        if is_first_of_machine() and not self._said:
            self._said = True
            _say(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Data workers inherit this handler for SIGINT, and ignore the first one, which may have
        # gone to the whole group: they are needed to finish the iteration. Other forked processes
        # end.
        if os.getpid() != self._process:
            is_ours = get_worker_info() is not None
        else:
            is_ours = is_running(self._loop(), frame)
        if not is_ours:
            self._restore_handlers()
            signal.raise_signal(number)
            return
        self._signal = number
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if os.getpid() == self._process:
                self._say_once(number)
        elif now - self._first > ONE_SIGNAL:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._watch is not None and os.getpid() == self._process:
            self._watch.close()
            self._watch = None

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves and stops if a signal came.

        Raises:
            Interrupted: If so.
        """
        if self._agreed() and not self.is_last_train_iter(runner):
            self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Does so in the middle of a validation."""
        if not self._signal or get_world_size() > 1 or self._is_over(runner):
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # puts the trained weights back in their place
                hook.after_val_epoch(runner)
        self._stop(runner, runner.iter)

    def after_val(self, runner: Runner) -> None:
        """Does so at the end of a validation."""
        if not self._is_over(runner) and self._agreed():
            self._stop(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Restores the previous handlers."""
        self._restore_handlers()

    def _is_over(self, runner: Runner) -> bool:
        stopped = getattr(runner.train_loop, 'stop_training', False)  # by EarlyStoppingHook
        return stopped or runner.iter >= runner.max_iters

    def _agreed(self) -> int:
        """The signal that any of the processes has seen; 0 if none has."""
        if get_world_size() > 1:
            seen = torch.tensor(self._signal)
            all_reduce(seen, op='max')
            self._signal = int(seen)
        return self._signal

    def _stop(self, runner: Runner, iteration: int) -> None:
        writers = [hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)]
        if not writers:
            writers = [SafeCheckpointHook()]
            writers[0].before_train(runner)
        try:
            path = writers[0].save_interrupted(runner, iteration)
        finally:
            # Only the first rank writes; if another one ended now, torchrun would end all.
            barrier()
            self._restore_handlers()
        name = signal.Signals(self._signal).name
        raise Interrupted(
            f'{name} after iteration {iteration}; saved {path}; go on with --resume', self._signal
        )
