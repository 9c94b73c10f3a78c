"""Files that are complete or absent, whenever the machine stops."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mmslak.errors import CheckpointError

BACKEND = 'mmslak.atomic'


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file under another name, flushes it to the disk, and renames it.

    Raises:
        OSError: If it cannot be written. An older file of this name is unchanged then.
    """
    path = Path(path)
    beside = path.with_name(f'.{path.name}.tmp')
    with _removed_on_error(beside):
        with beside.open('wb', buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the name is on the disk, too
    finally:
        os.close(folder)


@contextlib.contextmanager
def _removed_on_error(beside: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@register_backend(BACKEND)
class AtomicBackend(LocalBackend):
    """The local file system. `put` leaves the new file, the old one, or none, but no part of it."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes to a file.

        Raises:
            CheckpointError: If the disk is full or cannot be written to.
        """
        try:
            Path(filepath).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(filepath, obj)
        except OSError as error:
            raise CheckpointError(
                f'{filepath} cannot be written: {error.strerror or error}; '
                'checkpoints written before are untouched: make room and go on with --resume'
            ) from error
