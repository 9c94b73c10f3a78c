"""Keeps the census of files that have not changed, so that the next start does not wait for it."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mmslak import datasets
from mmslak.datasets.folders import files_below
from mmslak.fileio.atomic import write_atomically
from mmslak.ops.plans import cache_root


def remembered(key: str, make: Callable[[], dict]) -> dict:
    """What an earlier start has kept under a key; or what `make` gives, which is kept."""
    path = cache_root() / 'census' / f'{key}.json'
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass  # not there, or broken
    values = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(values).encode())
    except OSError:
        pass  # a home that cannot be written to costs the time alone
    return values


def key_of(dataset: object, full: bool) -> str:
    """A name that differs where anything does on which the census of a dataset depends.

    Args:
        dataset: A dataset, which may not be loaded yet.
        full: Whether all label maps are read.
    """
    settings = {
        name: repr(value)
        for name, value in vars(dataset).items()
        if isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))
    }
    pipeline = re.sub(' at 0x[0-9a-f]+', '', repr(getattr(dataset, 'pipeline', None)))
    facts = [type(dataset).__qualname__, full, settings, pipeline]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for source in sorted(Path(datasets.__file__).parent.glob('*.py')):
        digest.update(source.read_bytes())  # another version counts in another way
    for stamp in _stamps(dataset):
        digest.update(repr(stamp).encode())
    return digest.hexdigest()[:32]


def key_of_pair(first: str, second: str) -> str:
    """The key of what two datasets have in common."""
    return hashlib.sha256(f'{first} {second}'.encode()).hexdigest()[:32]


def _stamps(dataset: object) -> Iterator[tuple]:
    """Path, time and size of the annotations, and path and time of the folders of pictures."""
    prefixes = getattr(dataset, 'data_prefix', None) or {}
    prefixes = prefixes if isinstance(prefixes, dict) else {'img_path': prefixes}
    folders = {name: str(folder) for name, folder in prefixes.items() if folder}
    if 'sub_data_root' in folders:
        root = folders.pop('sub_data_root')
        folders['ann'] = os.path.join(root, getattr(dataset, 'ann_subdir', ''))
        folders['img'] = os.path.join(root, getattr(dataset, 'img_subdir', ''))
    if os.path.isfile(dataset.ann_file):
        yield _stamp(dataset.ann_file)
    for name, folder in sorted(folders.items()):
        reads_files = name.startswith(('seg', 'ann'))
        for here, files in files_below(folder):
            yield _stamp(here)
            if reads_files:
                yield from (_stamp(os.path.join(here, file)) for file in files)


def _stamp(path: str) -> tuple:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing
        return (path,)
    return path, status.st_mtime_ns, status.st_size
