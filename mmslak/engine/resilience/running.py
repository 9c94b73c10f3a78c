"""Whether a loop is running; MMEngine has no event for a run that ends by an exception."""

import sys
from types import FrameType

from mmengine.runner import BaseLoop


def is_running(loop: BaseLoop | None, frame: FrameType | None = None) -> bool:
    """Whether a loop's `run` is among the functions that are being called.

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
