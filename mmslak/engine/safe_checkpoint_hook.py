"""Checkpoints that survive a crash at any moment of their writing."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..atomic import DEFERRED, DeferredBackend, cannot_write, settle, write_atomically
from ..checkpoint import INTERRUPTED, MARKER
from ..registry import HOOKS

THREAD = 'checkpoint'  # its name


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, in the order that leaves something to resume from.

    A checkpoint is written beside its place, flushed to the disk and renamed; then
    `last_checkpoint` moves; then older checkpoints are removed. So it is with the best ones. Before
    a checkpoint is made, all ranks see the event `before_gather_checkpoint(runner)`, where hooks
    collect what the first rank, which alone writes, does not have.

    Training goes on while the disk works: flushing and all that follows is done by a thread, which
    the next save and the end of training wait for.

    Args:
        Those of CheckpointHook. Folders that are not on a local file system are written by their
        own backend, which has its own way to be atomic.
    """

    def before_train(self, runner: Runner) -> None:
        """Chooses the way of writing."""
        folder = str(self.out_dir or runner.work_dir)
        local = '://' not in folder and 's3:' not in folder
        if local and self.file_client_args is None and self.backend_args is None:
            self.backend_args = dict(backend=DEFERRED)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._after: list[Callable[[], None]] = []
        self._in_group = False
        super().before_train(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Looks after the thread.

        Raises:
            CheckpointError: If the disk took a checkpoint, but could not keep it.
        """
        if self._error is not None:
            self._wait()

    def after_train(self, runner: Runner) -> None:
        """Waits for the disk."""
        self._wait()
        super().after_train(runner)

    def save_interrupted(self, runner: Runner, iteration: int) -> str:
        """Saves everything there is, between the regular checkpoints, and moves the marker.

        Args:
            runner: The runner.
            iteration: Iterations done.

        Returns:
            The file, which the next regular checkpoint removes.
        """
        self._wait()
        path = self.file_backend.join_path(self.out_dir, INTERRUPTED)
        runner.call_hook('before_gather_checkpoint')
        runner.save_checkpoint(
            self.out_dir,
            INTERRUPTED,
            self.file_client_args,
            meta=dict(epoch=runner.epoch, iter=iteration),
            by_epoch=False,
            backend_args=self.backend_args,
        )
        self._after.append(lambda: self._move_marker(runner, path))
        self._finish()
        self._wait()
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Saves, moves the marker, removes: MMEngine removes first."""
        if not self._in_group:
            self._wait()
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if self.max_keep_ckpts > 0:
            if not kept or kept[-1] != step:
                kept.append(step)
            # With the surplus: a run that is killed before that is removed removes it on resuming.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.call_hook('before_gather_checkpoint')
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        last = self.last_ckpt
        self._after.append(lambda: self._move_marker(runner, last))
        if self.max_keep_ckpts > 0:
            for old in kept[: -self.max_keep_ckpts]:
                name = self.filename_tmpl.format(old)
                self._after.append(lambda name=name: self._remove(name))
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._after.append(lambda: self._remove(INTERRUPTED))
        if not self._in_group:
            self._finish()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Removes the best one of before when the new one and the last one are written."""
        if not self.save_best:
            return
        self._wait()
        runner.call_hook('before_gather_checkpoint')
        with self._removals_last():
            super()._save_best_checkpoint(runner, metrics)
        self._finish()

    @contextmanager
    def _removals_last(self) -> Iterator[None]:
        backend, self._in_group = self.file_backend, True
        self.file_backend = _Removals(backend)
        try:
            yield
            for path in self.file_backend.removed:
                self._after.append(lambda path=path: backend.remove(path))
        finally:
            self.file_backend, self._in_group = backend, False

    def _finish(self) -> None:
        """Settles what was written, then does what is to come after it, beside the training."""
        written, then, self._after = list(DeferredBackend.pending), self._after, []
        DeferredBackend.pending.clear()

        def work() -> None:
            path = None
            try:
                for beside, path in written:
                    settle(beside, path)
                for step in then:
                    step()
            except OSError as error:
                self._error = cannot_write(path or self.out_dir, error)

        if is_main_process():
            # Not a daemon: a process that ends waits for it.
            self._thread = threading.Thread(target=work, name=THREAD)
            self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _move_marker(self, runner: Runner, path: str) -> None:
        write_atomically(Path(runner.work_dir, MARKER), str(path).encode())

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


class _Removals:
    """A backend that notes what is to be removed."""

    def __init__(self, backend: object) -> None:
        self._backend, self.removed = backend, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removed.append(path)
