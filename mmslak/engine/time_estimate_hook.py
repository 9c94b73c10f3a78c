"""Says after a few steps how long the whole training takes."""

from datetime import datetime, timedelta

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmslak.registry import HOOKS

# The first step loads its data while nothing else is done, and measures convolutions.
STEPS, COUNTED = 3, 2


@HOOKS.register_module()
class TimeEstimateHook(Hook):
    """Logs once, after the third step of a run, how long its training takes.

    The estimate is of the last two steps with their data, and without validations. It needs
    MMEngine's IterTimerHook, which measures them.
    """

    priority = 'VERY_LOW'  # after IterTimerHook

    def before_train(self, runner: Runner) -> None:
        """Keeps where the run starts."""
        self._first = runner.iter

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Logs the estimate."""
        done, left = runner.iter + 1, runner.max_iters - runner.iter - 1
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
