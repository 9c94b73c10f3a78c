"""What MMEngine has no event for: whether a loop is running, and who waits for its scores."""

import sys
from itertools import chain
from types import FrameType

from mmengine.runner import BaseLoop, Runner


def is_running(loop: BaseLoop | None, frame: FrameType | None = None) -> bool:
    """Whether a loop's `run` is among the functions that are being called.

    A run that ends by an exception calls no hook.

    Args:
        loop: The loop; None, as a weak reference returns it for a loop that is gone, never runs.
        frame: The innermost frame, as a signal handler gets it; None takes the caller's.
    """
    frame = frame or sys._getframe(1)
    while loop is not None and frame is not None:
        if frame.f_code.co_name == 'run' and frame.f_locals.get('self') is loop:
            return True
        frame = frame.f_back
    return False


def waiting_schedulers(runner: Runner) -> list:
    """The schedulers that take a score of the validation, as ReduceOnPlateau does."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = chain.from_iterable(schedulers.values())
    return [scheduler for scheduler in schedulers if getattr(scheduler, 'need_val_args', False)]
