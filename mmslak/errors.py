"""What costs a user one line and no traceback."""

import functools
import logging
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says how.

    Attributes:
        of_one_process: Of several processes one alone can have it, so that each one reports its
            own.
    """

    of_one_process = False


class CheckpointError(UserError):
    """A file that cannot be used; the message names the file and what was expected."""


class Interrupted(Exception):  # noqa: N818
    """Training stopped because of a signal, with everything saved.

    Attributes:
        status: Exit status of a process that a signal ended, by the shell's convention.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def own_errors_only(check: Callable) -> Callable:
    """Lets a check raise nothing but UserError: whatever else it trips over is one warning."""

    @functools.wraps(check)
    def wrapper(*args, **kwargs) -> object:
        try:
            return check(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            name = check.__name__.strip('_')
            warn(f'{name} was left out, since it ended with {type(error).__name__}: {error}')
            return None

    return wrapper


def warn(message: str) -> None:
    """Logs a warning."""
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first names, and how many more there are, for a message."""
    names = list(names)
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return (', '.join(map(str, names[:count])) + rest) or 'nothing'
