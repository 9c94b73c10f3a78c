"""Whether a training goes on. MMEngine tells hooks of its end, but not of one by an exception."""

import sys
from types import FrameType

from mmengine.runner import BaseLoop


def is_running(loop: BaseLoop | None, frame: FrameType | None = None) -> bool:
    """Whether a loop's `run` is what has led to this call.

    Args:
        loop: The loop; None, what a weak reference gives to one that is gone, never runs.
        frame: The frame to begin with, as a signal handler gets it; the caller's when None.
    """
    frame = frame or sys._getframe(1)
    while loop is not None and frame is not None:
        if frame.f_code.co_name == 'run' and frame.f_locals.get('self') is loop:
            return True
        frame = frame.f_back
    return False
