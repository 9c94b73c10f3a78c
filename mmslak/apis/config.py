"""Reads configs and finds classes and settings in them."""

import contextlib
import importlib.util
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path

from mmengine import registry as registries
from mmengine.config import Config

from mmslak import config_file
from mmslak.apis.prints import redirect_prints
from mmslak.errors import UserError, own_errors_only
from mmslak.fileio.absent import absent_config

REGISTRIES = (
    *(registries.MODELS, registries.DATASETS, registries.TRANSFORMS, registries.HOOKS),
    *(registries.METRICS, registries.OPTIMIZERS, registries.OPTIM_WRAPPERS),
    *(registries.PARAM_SCHEDULERS, registries.LOOPS, registries.DATA_SAMPLERS),
    *(registries.FUNCTIONS, registries.TASK_UTILS, registries.VISUALIZERS),
    *(registries.VISBACKENDS, registries.LOG_PROCESSORS),
)
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def read_config(path: str) -> Config:
    """Reads a config.

    Args:
        path: A file, or `mmslak::NAME` of one that mmslak ships.

    Raises:
        UserError: If it does not exist, cannot be evaluated or has no model.
    """
    fault = absent_config(path)
    if fault:
        raise UserError(fault)
    try:
        cfg = Config.fromfile(config_file(path))
    except Exception as error:  # a config is a program: it can raise anything
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error
    if 'model' not in cfg:
        raise UserError(f'config {path} has no model; files in _base_ are parts of configs')
    return cfg


def work_dir(cfg: Config) -> str:
    """The folder of a config's results: its own, or one of its name in work_dirs."""
    return cfg.get('work_dir') or str(Path('work_dirs', Path(cfg.filename).stem))


def resolve(node: dict, cfg: Config) -> type | None:
    """The class or function that a dict's `type` names; None if there is no such class."""
    name = node.get('type')
    if not isinstance(name, str):
        return name
    if '.' not in name:
        name = f'{node.get("_scope_", cfg.get("default_scope", "mmengine"))}.{name}'
    for registry in REGISTRIES:
        try:
            found = registry.get(name)
        except RuntimeError:  # newer MMEngine raises where older ones give None
            continue
        if found is not None:
            return found
    return None


def class_name(part: dict) -> str:
    """Name of the class of a part of the config, without its scope."""
    return str(part.get('type', '')).rpartition('.')[2]


def accepted_arguments(target: type) -> set[str] | None:
    """Names of the arguments that a class or function takes; None if it takes any.

    Those that **kwargs hands on to a base class are included.
    """
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)['__init__'] for base in target.__mro__ if '__init__' in vars(base)]
    names = set()
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {'self'}
    return None


def walk(node: dict | list, path: str = '') -> Iterator[tuple[str, object]]:
    """All (dotted path, value) below a node of the config."""
    items = node.items() if isinstance(node, (dict, Config)) else enumerate(node)
    for key, value in items:
        here = f'{path}.{key}'.lstrip('.')
        yield here, value
        if isinstance(value, (dict, list, tuple)):
            yield from walk(value, here)


def innermost_datasets(dataset: dict, path: str = 'dataset') -> Iterator[tuple[str, dict]]:
    """(path, dict) of the datasets inside RepeatDataset, ConcatDataset and other wrappers."""
    if isinstance(dataset.get('dataset'), dict):
        yield from innermost_datasets(dataset['dataset'], f'{path}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for index, part in enumerate(dataset['datasets']):
            yield from innermost_datasets(part, f'{path}.datasets.{index}')
    else:
        yield path, dataset


@own_errors_only
def check_scope(cfg: Config) -> None:
    """Checks that the library of a config's default_scope is installed, and imports its data sets.

    Raises:
        UserError: If not.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if importlib.util.find_spec(scope) is None:
        raise UserError(f"the config's default_scope is {scope!r}, but {scope} is not installed")
    _import_datasets(scope)


def _import_datasets(scope: str) -> None:
    """Imports data sets without the line that the OneDL stack prints for those of its service."""
    said = io.StringIO()
    # A library that cannot be imported says so where it is used.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(said):
        importlib.import_module(f'{scope}.datasets')
    print(re.sub(r'Could not import OneDL.*\n', '', said.getvalue()), end='')
    redirect_prints()
