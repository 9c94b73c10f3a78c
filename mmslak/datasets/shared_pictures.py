"""Finds pictures that two splits share: the score on them says nothing about new pictures."""

import hashlib
import os
from collections.abc import Callable, Iterable

from mmslak.datasets.findings import Finding, examples, of
from mmslak.datasets.guard import innermost

AT_MOST = 1000  # pairs that are looked for
HEAD = 64 * 1024  # bytes that are compared before whole files
BLOCK = 1024 * 1024


def shared_pictures(
    train_paths: Iterable[str], val_paths: Iterable[str], at_most: int = AT_MOST
) -> list[tuple[str, str]]:
    """Finds files of two lists that have the same content, whatever their names are.

    Few files are read: sizes are compared first, then the beginnings of those of one size, then
    all of those that begin alike. A file that both lists name or link to is not read.

    Args:
        train_paths: Files; those that do not exist or are empty are passed over.
        val_paths: Likewise.
        at_most: Pairs after which the search ends.

    Returns:
        (train, val) for each file of `val_paths` that is in `train_paths`, too; of several equal
        training pictures the first.
    """
    train, val = list(dict.fromkeys(train_paths)), list(dict.fromkeys(val_paths))
    pairs = [(part[0], path) for part, paths in _split(train, val, _inode) for path in paths]
    same = {path for _, path in pairs}
    groups = [(train, [path for path in val if path not in same])]
    for key in (_size, _head):
        groups = [part for group in groups for part in _split(*group, key)]
    for group in groups:
        if len(pairs) >= at_most:
            break
        pairs += [(part[0], path) for part, paths in _split(*group, _content) for path in paths]
    return pairs[:at_most]


def _split(
    train: list[str], val: list[str], key: Callable[[str], object]
) -> list[tuple[list[str], list[str]]]:
    """The parts of two lists of files for which a key is the same."""
    parts: dict[object, tuple[list[str], list[str]]] = {}
    for path in val:
        if (found := key(path)) is not None:
            parts.setdefault(found, ([], []))[1].append(path)
    for path in train if parts else ():
        if (found := key(path)) in parts:
            parts[found][0].append(path)
    return [part for part in parts.values() if part[0]]


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size or None
    except OSError:
        return None


def _head(path: str) -> bytes | None:
    return _digest(path, HEAD)


def _content(path: str) -> bytes | None:
    return _digest(path)


def _digest(path: str, size: int | None = None) -> bytes | None:
    """Digest of the first `size` bytes of a file, or of all; None if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, 'rb') as file:
            while block := file.read(size or BLOCK):
                digest.update(block)
                if size:
                    break
    except OSError:
        return None
    return digest.digest()


def shared_finding(
    train: Iterable[str], val: Iterable[str], loader: str = 'val_dataloader'
) -> Finding | None:
    """What to tell about the pictures that two splits share.

    Args:
        train: Files of the pictures of train_dataloader.
        val: Those of another loader.
        loader: That one.

    Returns:
        A finding, or None if they share nothing.
    """
    val = list(dict.fromkeys(val))
    pairs = shared_pictures(train, val, AT_MOST)
    if not pairs:
        return None
    ours, theirs = pairs[0]
    count = (
        f'{"at least " if len(pairs) == AT_MOST else ""}{len(pairs)} of {of(len(val), "picture")}'
    )
    same = f'{theirs}' if ours == theirs else f'{theirs}, which is {ours}'
    return Finding(
        'shared-pictures',
        f'{count} {"is" if len(pairs) == 1 else "are"} in train_dataloader, too, such as {same}: '
        'scores on pictures that were learnt do not tell how new ones are seen; take them out of '
        'one of the two',
        loader=loader,
        files=examples(path for _, path in pairs),
        count=len(pairs),
    )


def picture_paths(dataset: object) -> list[str]:
    """Files of all pictures of a dataset, also of one inside of wrappers."""
    samples = (inner.get_data_info(i) for inner in innermost(dataset) for i in range(len(inner)))
    paths = (sample.get('img_path') for sample in samples)
    return [path for path in paths if isinstance(path, str)]
