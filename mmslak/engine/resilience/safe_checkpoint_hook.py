"""Checkpoints that survive a crash at any moment of their writing."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmslak.checkpoints.runs import INTERRUPTED, MARKER, warn_of_refused
from mmslak.fileio.atomic import BACKEND, AtomicBackend
from mmslak.registry import HOOKS


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, which at any moment leaves a checkpoint to resume from.

    A checkpoint is written to a temporary file, flushed to the disk and renamed; then
    `last_checkpoint` is updated; then older checkpoints are removed. Best checkpoints are written
    in the same order. Before a checkpoint is made, all ranks get the event
    `before_gather_checkpoint(runner)`, in which hooks collect the states of all ranks, because only
    the first rank writes.

    The arguments are those of CheckpointHook. Folders that are not on a local file system are
    written by their own backend, which has its own way to be atomic.
    """

    _scores: dict | None = None  # of the validation that is about to end

    def before_train(self, runner: Runner) -> None:
        """Chooses how files are written."""
        folder = str(self.out_dir or runner.work_dir)
        local = '://' not in folder and 's3:' not in folder
        if local and self.file_client_args is None and self.backend_args is None:
            self.backend_args = dict(backend=BACKEND)
        self._after: list[Callable[[], None]] = []
        self._in_group = False
        self._first_save = True
        super().before_train(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Keeps the scores for `after_val`."""
        self._scores = metrics

    def after_val(self, runner: Runner) -> None:
        """Saves the best checkpoint after all hooks have the scores.

        MMEngine saves it before EarlyStoppingHook has them, whose state would be an old one. A
        detector that detects nothing yet has no scores, and no best checkpoint.
        """
        scores, self._scores = self._scores, None
        if scores:
            super().after_val_epoch(runner, scores)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Warns at the first save of what `--resume` will not read back."""
        if self._first_save:
            self._first_save = False
            warn_of_refused(checkpoint)

    def save_interrupted(self, runner: Runner, iteration: int) -> str:
        """Saves everything there is, between the regular checkpoints, and moves the marker.

        Args:
            runner: The runner.
            iteration: Iterations done.

        Returns:
            The file, which the next regular checkpoint removes.
        """
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
        self._move_marker(runner, path)
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Saves, moves the marker, removes: MMEngine removes first."""
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
        """Removes the previous best checkpoint after the new one and the last one are written."""
        if not self.save_best:
            return
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
        """Runs the steps that come after the writing, on the first rank only."""
        after, self._after = self._after, []
        if is_main_process():
            for step in after:
                step()

    @master_only
    def _move_marker(self, runner: Runner, path: str) -> None:
        AtomicBackend().put(str(path).encode(), Path(runner.work_dir, MARKER))

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


class _Removals:
    """A backend that lists the files to remove and leaves them."""

    def __init__(self, backend: object) -> None:
        self._backend, self.removed = backend, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removed.append(path)
