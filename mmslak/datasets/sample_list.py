"""Lists of samples that several processes write."""

import json
import os
from pathlib import Path

LIST_LIMIT = 8 * 2**20  # bytes of a list of odd samples


class SampleList:
    """A file with one line of JSON per sample and reason, which all workers and ranks write.

    Args:
        path: The file.
        limit: Size in bytes at which the list is full; None sets no limit.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        self._added: set[tuple[str, str]] = set()
        self._begin()

    def _begin(self) -> None:
        self._read, self._samples, self._files = 0, {}, set()

    def add(self, file: str, reason: str) -> None:
        """Appends a sample that this process has not added before."""
        if (file, reason) in self._added:
            return
        self._added.add((file, reason))
        line = json.dumps(dict(file=file, reason=reason)) + '\n'
        # Each line is one write, so that lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if self.limit is not None and size >= self.limit:
                return
            if size and os.pread(descriptor, 1, size - 1) != b'\n':
                line = '\n' + line  # a process died while it wrote
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, dict[str, None]]:
        """The files of each reason, in the order of the list; reads the lines that are new."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._read:  # begun anew
            self._begin()
        if size > self._read:
            with self.path.open('rb') as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b'\n')
            self._read += len(whole + newline)
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    file, reason = entry['file'], entry['reason']
                    self._files.add(file)
                    self._samples.setdefault(reason, {})[file] = None
                except (ValueError, LookupError, TypeError):
                    pass  # a line that is half written
        return self._samples

    def count(self) -> int:
        """Number of different files in the list."""
        self.read()
        return len(self._files)
