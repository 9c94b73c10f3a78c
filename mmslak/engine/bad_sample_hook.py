"""What training does about samples that cannot be trained on."""

from pathlib import Path

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..datasets.bad_samples import BadSampleError, BadSampleList, guard
from ..registry import HOOKS

LIST = 'bad_samples.jsonl'
POLICIES = ('error', 'skip')


@HOOKS.register_module()
class BadSampleHook(Hook):
    """Checks samples while they are loaded: unreadable, truncated, 16-bit or transparent pictures,
    label maps of another size or with unknown classes, empty and degenerate boxes.

    Args:
        policy: 'error' stops at the first one; 'skip' lets the dataset draw another sample, lists
            what was skipped in `bad_samples.jsonl` of the work folder, and stops when it is too
            much. Samples of validation are never skipped.
        most: Share of the training samples that may be bad.

    Raises:
        ValueError: On another policy, or a share out of [0, 1].
    """

    priority = 'VERY_HIGH'  # before anything reads data

    def __init__(self, policy: str = 'error', most: float = 0.01) -> None:
        if policy not in POLICIES:
            raise ValueError(f'policy: expected one of {", ".join(POLICIES)}, got {policy!r}')
        if not 0 <= most <= 1:
            raise ValueError(f'most: expected a share in [0, 1], got {most!r}')
        self.policy, self.most = policy, most
        self._list: BadSampleList | None = None
        self._said = 0

    def before_run(self, runner: Runner) -> None:
        """Adds what comes after hooks that change pipelines."""
        if not any(isinstance(hook, _Again) for hook in runner.hooks):
            runner.register_hook(_Again(self))

    def before_train(self, runner: Runner) -> None:
        """Puts the checks into the datasets."""
        self._list = BadSampleList(Path(runner.work_dir, LIST))
        if runner.iter == 0 and is_main_process():
            self._list.path.unlink(missing_ok=True)
        barrier()
        self._said = self._list.count()
        self._guard(runner)
        if runner.val_loop is not None:
            guard(runner.val_loop.dataloader.dataset, _stop)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Counts what was skipped.

        Raises:
            BadSampleError: If it is too much.
        """
        if self.policy == 'error':
            return
        count = self._list.count()
        if count > self._said:
            self._said = count
            runner.logger.warning(
                f'{count} bad samples of {self._total} skipped so far, listed in {self._list.path}'
            )
        if count > self.most * self._total:
            raise BadSampleError(
                f'{self._list.path}: {count} of {self._total} training samples are bad, more than '
                f'{self.most:.0%}; repair them, then remove this list'
            )

    def _guard(self, runner: Runner) -> None:
        on_bad = self._list.add if self.policy == 'skip' else _stop
        self._total = guard(runner.train_dataloader.dataset, on_bad)


class _Again(Hook):
    """Puts the checks into a pipeline that another hook has set, as mmdet's PipelineSwitchHook.

    Before the loader's workers of the epoch begin, hence not in `before_train_iter`.
    """

    priority = 'VERY_LOW'  # after those hooks

    def __init__(self, hook: BadSampleHook) -> None:
        self._hook = hook

    def before_train_epoch(self, runner: Runner) -> None:
        self._hook._guard(runner)


def _stop(file: str, reason: str) -> None:
    raise BadSampleError(f'{file}: {reason}')
