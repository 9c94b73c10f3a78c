"""The checks of a config, run over every config that the installed libraries ship.

`refusals('mmseg')` takes all cores; what comes back is one line per config that a check refuses.
"""

import importlib.util
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mmengine.config import Config

import mmslak  # noqa: F401
from mmslak.apis.config import LOADERS, check_scope, innermost_datasets, walk
from mmslak.apis.options import _check_key
from mmslak.cli import config_checks
from mmslak.cli.config_checks import _check_class_count, _check_masks, check_replaced_backbone

SHARE = 20  # configs that a process takes at a time


def folder(scope: str) -> Path:
    return Path(importlib.util.find_spec(scope).origin).parent / '.mim/configs'


def files(scope: str) -> list[Path]:
    """All configs; files in `_base_` are parts of them."""
    root = folder(scope)
    return [path for path in sorted(root.rglob('*.py')) if '_base_' not in path.parts]


def refusals(scope: str) -> tuple[int, list[str]]:
    """Number of configs that can be read, and what the checks refuse."""
    context = get_context('fork')
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_in_memory) as pool:
        found = list(pool.map(_look, files(scope), chunksize=SHARE))
    read = [lines for lines in found if lines is not None]
    return len(read), [line for lines in read for line in lines]


def _in_memory() -> None:
    """MMEngine copies each file that it reads, which is most of the time on a slow disk."""
    if os.access('/dev/shm', os.W_OK):
        tempfile.tempdir = '/dev/shm'
    config_checks.warn = lambda message: None if 'ended with' not in message else _tripped(message)


def _tripped(message: str) -> None:
    raise AssertionError(message)


def _look(path: Path) -> list[str] | None:
    try:
        cfg = Config.fromfile(path, lazy_import=False)
    except Exception:  # a few of the shipped files cannot be read, by MMEngine either
        return None
    if 'model' not in cfg:
        return []
    lines = []
    for check in (_counts, check_scope.__wrapped__, _replaced, _keys):
        try:
            check(cfg)
        except Exception as error:
            lines.append(f'{path.name}: {type(error).__name__}: {error}')
    return lines


def _counts(cfg: Config) -> None:
    for loader in filter(cfg.get, LOADERS):
        for path, dataset in innermost_datasets(cfg[loader]['dataset'], loader):
            _check_class_count(cfg, dataset)
            if loader == 'train_dataloader':
                _check_masks(cfg, path, dataset)


def _replaced(cfg: Config) -> None:
    check_replaced_backbone.__wrapped__(cfg)


def _keys(cfg: Config) -> None:
    """Whatever stands in the config may be set by --cfg-options."""
    for path, _ in walk(cfg):
        if '.custom_keys.' in path:
            continue  # names of parameters have dots of their own, and MMEngine takes none of them
        _check_key.__wrapped__(cfg, path)
