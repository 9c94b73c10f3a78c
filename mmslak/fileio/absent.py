"""Files that a person names and that are not there, told without torch."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from mmslak import config_file


def absent_config(path: str) -> str | None:
    """What to say of a config that is not there, with the nearest that is; None if it is there."""
    file = Path(config_file(path))
    if file.is_file():
        return None
    there = [p.name for p in file.parent.glob('*.py')] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, sorted(there), n=1)
    folder = path.removesuffix(Path(path.rpartition('::')[2]).name)
    hint = f'; did you mean {folder}{near[0]}?' if near else ''
    return f'config {path} not found{hint}'


def absent_checkpoint(path: str | Path) -> str | None:
    """What to say of a checkpoint that is not there; None if it is there or has an address."""
    # Path's own is_file raises on names that are too long.
    is_there = '://' in str(path) or os.path.isfile(path)
    return None if is_there else f'{path}: no such checkpoint file'


def absent_input(paths: Iterable[str | Path]) -> str | None:
    """What to say of pictures of which none is there; None if one is, or there are no names."""
    paths = list(paths)
    if not paths or any(map(os.path.exists, paths)):
        return None
    return f'{paths[0]}: no such picture, folder or video'
