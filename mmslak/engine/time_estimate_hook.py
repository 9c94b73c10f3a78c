"""Says after a few steps how long the whole training takes."""

import time
from datetime import datetime, timedelta

from mmengine.hooks import Hook, IterTimerHook
from mmengine.runner import Runner

from mmslak.ops.choice import tell_measured
from mmslak.registry import HOOKS

# The first step loads its data while nothing else is done, and measures convolutions.
STEPS, COUNTED = 3, 2
SLOW = 10.0  # seconds of a first step that a person would wonder about


@HOOKS.register_module()
class TimeEstimateHook(Hook):
    """Logs that a training starts, and after its third step how long it takes.

    The estimate is of the last two steps with their data, and without validations. It needs
    MMEngine's IterTimerHook, which measures them. After a slow first step a line says how long
    that step took.
    """

    priority = 'VERY_LOW'  # after IterTimerHook

    def before_train(self, runner: Runner) -> None:
        """Keeps where the run starts."""
        self._first, self._start = runner.iter, time.monotonic()

    def before_train_epoch(self, runner: Runner) -> None:
        """Logs the start, after all that hooks do before it, such as a rehearsal."""
        if runner.iter != self._first:
            return
        self._start = time.monotonic()
        line = 'training starts'
        has_timer = any(isinstance(hook, IterTimerHook) for hook in runner.hooks)
        if runner.max_iters - runner.iter > STEPS and has_timer:
            line += f'; the first estimate of its time comes after step {runner.iter + STEPS}'
        runner.logger.info(line)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Logs the time of a slow first step, and the estimate."""
        done, left = runner.iter + 1, runner.max_iters - runner.iter - 1
        if done - self._first == 1:
            tell_measured()  # convolutions meet most of their shapes in this step
            seconds = time.monotonic() - self._start
            if seconds > SLOW:
                runner.logger.info(f'the first step took {duration(seconds)}')
        times = runner.message_hub.log_scalars.get('train/time')
        if done - self._first == STEPS and left and times is not None:
            runner.logger.info(estimate(times.mean(COUNTED), runner.max_iters, left))


def estimate(seconds: float, steps: int, left: int, now: datetime | None = None) -> str:
    """How long a training takes, in one line.

    Args:
        seconds: Of one step.
        steps: In all.
        left: Those that are still to do.
        now: The time that it is; None takes the clock.
    """
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds * left)
    day = '' if end.date() == now.date() else f'{end:%B} {end.day}, '
    return (
        f'a step takes about {seconds:.{1 if seconds >= 1 else 2}f} s: about '
        f'{duration(seconds * steps)} in all without validations, ends at {day}{end:%H:%M}'
    )


def duration(seconds: float) -> str:
    """A time with the unit that reads best: `50 s`, `40 min`, `5.2 h` or `3.5 days`."""
    for unit, length, until in (('s', 1, 90), ('min', 60, 5400), ('h', 3600, 36 * 3600)):
        if seconds < until:
            return f'{seconds / length:.{int(unit == "h")}f} {unit}'
    return f'{seconds / 86400:.1f} days'
