"""A file that lists samples, written to by many processes at once."""

import json
import os
from pathlib import Path

LIST_LIMIT = 8 * 2**20  # bytes of a list of odd samples


class SampleList:
    """A file of samples and reasons, a line of JSON each, written to by all workers and ranks.

    Args:
        path: The file.
        limit: Bytes from which on nothing is added; None sets no limit.
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
        # One write of a line: those of several processes do not mix.
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
        """Different files of each reason, in the order of the file; reads what is new in it."""
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
                    pass  # not written to its end
        return self._samples

    def count(self) -> int:
        """Number of different files in it."""
        self.read()
        return len(self._files)
