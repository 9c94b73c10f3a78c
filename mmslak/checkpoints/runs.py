"""Checkpoints in the work folder of a run: the newest intact one, and what can be resumed."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmengine.logging import print_log

from mmslak.checkpoints import torch_file
from mmslak.checkpoints.files import UNREADABLE, read_checkpoint
from mmslak.errors import CheckpointError, first_few

MARKER = 'last_checkpoint'  # in the work folder; names the newest checkpoint
LONGEST_NAME = 255  # of a file, in a message
INTERRUPTED = 'interrupted.pth'  # of a run that was told to stop


def warn_of_refused(content: dict) -> None:
    """Warns if `read_checkpoint`, and so `--resume`, will refuse a checkpoint that is to be saved.

    Args:
        content: The checkpoint.
    """
    refused = list(_refused(content))
    if refused:
        print_log(
            f'Checkpoints of this run cannot be resumed from, because of {first_few(refused)}: '
            'keep plain values, lists, dicts, tensors or arrays of numbers there',
            logger='current',
            level=logging.WARNING,
        )


def _refused(content: object, *place: str) -> Iterator[str]:
    """Finds places and reasons, down to the entries of dicts in the message hub."""
    try:
        torch_file.check(content)
    except UNREADABLE as error:
        entries = content.items() if isinstance(content, dict) and len(place) < 4 else ()
        inner = [text for key, value in entries for text in _refused(value, *place, str(key))]
        yield from inner or [f'{".".join(place)} ({error})']


def newest_intact(folder: str | Path, keep: bool = False) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint in a work folder that a run can resume from.

    `last_checkpoint` names it, unless newer ones were written later. If it is damaged, the next
    older one is taken. All bytes of the checkpoint are read and verified.

    Args:
        folder: The work folder.
        keep: See `read_checkpoint`.

    Returns:
        The file, or None if the folder has no checkpoints; and why newer ones were passed over.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    folder = Path(folder)
    passed_over = []
    for path in _newest_first(folder):
        if path == folder / MARKER:
            passed_over.append(f'{path}: names no file')
            continue
        try:
            content = read_checkpoint(path, keep)
            if not {'meta', 'state_dict', 'message_hub'} <= content.keys():
                raise CheckpointError(f'{path}: not a checkpoint of a run to resume')
            return path, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f'no intact checkpoint in {folder}: ' + '; '.join(passed_over))
    return None, []


def _newest_first(folder: Path) -> list[Path]:
    """Lists the checkpoints of a run, the newest first."""
    marker, named, moved = folder / MARKER, None, -1
    if marker.is_file():
        named, moved = _named_by(marker), marker.stat().st_mtime_ns
    files = [
        path
        for path in folder.glob('*.pth')
        if re.search(r'\d\.pth$|^interrupted\.pth$', path.name)
        and not re.search(r'^(best|non_finite)_|-[0-9a-f]{8}\.pth$', path.name)
        and path != named
    ]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name), reverse=True)
    if named is None:
        return files
    newer = [path for path in files if path.stat().st_mtime_ns > moved]
    if newer:  # written and not yet named, or copied later
        last = _iteration(named)
        newer = [path for path in newer if (_iteration(path) or last + 1) > last]
    return [*newer, named, *(path for path in files if path not in newer)]


def _named_by(marker: Path) -> Path:
    """Gives the checkpoint that a marker names; the marker itself if its text is no file's name.

    A file of that name beside the marker comes first: the folder may have been moved or copied.
    """
    text = marker.read_text(errors='replace').strip()
    for path in (marker.parent / Path(text).name, Path(text)):
        if os.path.isfile(path):
            return path
    return Path(text) if text.isprintable() and 0 < len(text) <= LONGEST_NAME else marker


def _iteration(path: Path) -> int:
    """Gives the number of iterations in a checkpoint; 0 if it cannot be read."""
    try:
        return int(torch_file.load(path, tensors=False)['meta']['iter'])
    except UNREADABLE:
        return 0
