"""The files in the folders of a data set, of which each folder is read once for a census."""

import contextlib
import functools
import os
from collections.abc import Iterator

from mmslak.datasets.findings import Finding
from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import first_few


@functools.cache
def files_below(folder: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(path of a folder, names of its files) for a folder and all those below it.

    Hidden files are left out, as MMEngine does, and links to nothing. The answer is kept: see
    `read_once`.
    """
    found, folders = [], [folder]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        names = []
        for entry in entries:
            try:
                if entry.is_dir():
                    folders += [] if _leads_back(entry) else [entry.path]
                elif entry.is_file() and not entry.name.startswith('.'):
                    names.append(entry.name)
            except OSError:  # a link to itself
                continue
        found.append((here, tuple(names)))
    return tuple(found)


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a folder is a link to a folder in which it is."""
    if not entry.is_symlink():
        return False
    real = os.path.realpath(entry.path)
    return os.path.commonpath([real, os.path.realpath(os.path.dirname(entry.path))]) == real


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Within it each folder is read once, and anew in the next one."""
    files_below.cache_clear()
    try:
        yield
    finally:
        files_below.cache_clear()


def paths_below(folder: str) -> list[str]:
    """Paths of all files below a folder, which they begin with."""
    below = ((os.path.join(here, ''), names) for here, names in files_below(folder))
    return [here + name for here, names in below for name in names]


def names_below(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    return [_below(path, folder) for path in paths_below(folder)]


def _below(path: str, folder: str) -> str:
    return path.removeprefix(os.path.join(folder, ''))


# ---------------------------------------------------------------- what is named but absent


def absent_files(paths: list[str], folder: str) -> list[str]:
    """Those of some files that are not there, of which most are below a folder."""
    there = set(paths_below(folder))
    return [p for p in dict.fromkeys(paths) if p not in there and not os.path.isfile(p)]


def absent_pictures(
    paths: list[str], folder: str, source: str, looks_for: str = ''
) -> list[Finding]:
    """Finds pictures that are listed but absent.

    Args:
        paths: Of all pictures that are listed.
        folder: The one from which the list leads to them.
        source: The list.
        looks_for: Says which suffix is looked for, where the list has none.
    """
    absent, total = absent_files(paths, folder), len(dict.fromkeys(paths))
    if not absent:
        return []
    near = _near(absent[0], folder)
    if near:
        hint = f'; there is {near}' + (f', and {looks_for}' if looks_for else '')
    elif len(absent) == total:
        hint = '; data_prefix is to be the folder from which the list leads to its pictures'
    else:
        hint = ''
    shown = first_few(_below(path, folder) for path in absent)
    message = (
        f'{len(absent)} of {total} pictures that {source} lists are not in '
        f'{os.path.normpath(folder)}: {shown}{hint}'
    )
    return [Finding.of_files('pictures-absent', message, absent, len(absent) == total)]


def _near(path: str, folder: str) -> str | None:
    """A picture beside another one with its name in other letters or with another suffix."""
    stem = os.path.splitext(path)[0].lower()
    there = (p for p in paths_below(folder) if os.path.splitext(p)[0].lower() == stem)
    return next((p for p in there if p.lower().endswith(PICTURE_SUFFIXES)), None)
