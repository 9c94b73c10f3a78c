"""Sees signals at once, while the main thread is inside of one long call."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable


class SignalWatch:
    """Calls a function in a thread of its own as soon as a signal comes.

    Python runs signal handlers between two of its instructions, and one call of torch can take
    minutes. The system's handler writes the signal's number into a pipe (`signal.set_wakeup_fd`),
    at whose other end a thread waits. Who wanted these numbers before gets them, too.

    To be made and closed in the main thread. A forked process has the pipe, but not the thread: it
    has to leave it with `signal.set_wakeup_fd(-1)`.

    Args:
        seen: Is called with the number of each signal that has a handler in Python.
    """

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name='signal watch', daemon=True).start()

    def _watch(self) -> None:
        with open(self._out, 'rb', buffering=0) as pipe:
            while numbers := pipe.read(64):  # until the other end is closed
                if self._before >= 0:
                    with contextlib.suppress(OSError):
                        os.write(self._before, numbers)
                for number in numbers:
                    self._seen(number)

    def close(self) -> None:
        """Ends the thread; signals go where they went before."""
        with contextlib.suppress(OSError, ValueError):  # who wanted them may be gone
            signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(self._before)
        os.close(self._in)
