"""Checks of a config before anything is built.

What the user can put right costs one line in place of a traceback.
"""

import difflib
import functools
import importlib.util
import inspect
import logging
import os
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from torch.utils.data import DataLoader

from . import released
from .checkpoint import is_pretrained
from .datasets.catalog import DATASETS

# Keys beside a `type` that MMEngine itself reads, so that no signature shows them.
READ_BY_MMENGINE = {
    '_delete_',
    '_scope_',
    'type',
    'priority',
    'requires_grad',
    'convert_to_iter_based',
    'constructor',
    'paramwise_cfg',
    'num_batch_per_epoch',
    'disable_subprocess_warning',
}
# Top-level keys that MMEngine and the tools read from the whole config, beside Runner's arguments.
READ_FROM_CONFIG = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Parts of a model whose num_classes is the dataset's.
HEADS = re.compile(
    r'model\.(data_preprocessor|(roi_head\.)?(decode|auxiliary|bbox|mask|mask_iou)_head(\.\d+)?|head)'
)
# Heads whose num_classes is not the number of the dataset's classes: STDCHead learns edges, and
# SideAdapterCLIPHead the words of its text encoder.
OTHER_CLASSES = ('STDCHead', 'SideAdapterCLIPHead')
# Trees of the datasets that our configs use, each with the folders that tell the standard tree and
# what tools/prepare_data.py calls their data.
TREES = {
    'ADE20KDataset': (
        {'images/training': 'ade20k', 'images/validation': 'ade20k'},
        'images/{training,validation}/*.jpg and annotations/{training,validation}/*.png',
    ),
    'VOCDataset': (
        {'VOC2007/JPEGImages': 'voc2007', 'VOC2012/JPEGImages': 'voc2012'},
        '{VOC2007,VOC2012}/{JPEGImages/*.jpg,Annotations/*.xml,ImageSets/Main/{trainval,test}.txt} '
        '(VOC2012 only where the config names it)',
    ),
    'CocoDataset': (
        {'train2017': 'coco', 'val2017': 'coco'},
        '{train2017,val2017}/*.jpg and annotations/instances_{train2017,val2017}.json',
    ),
    'ImageNet': ({'train': 'imagenet', 'val': 'imagenet'}, '{train,val}/CLASS/*.JPEG'),
}


class UserError(ValueError):
    """Something that the user can put right; the message is one line that says how."""


def own_errors_only(check: Callable) -> Callable:
    """Lets a check raise nothing but UserError: whatever else it trips over is one warning."""

    @functools.wraps(check)
    def wrapper(*args, **kwargs) -> object:
        try:
            return check(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            name = check.__name__.strip('_')
            warn(f'{name} was left out, since it ended with {type(error).__name__}: {error}')
            return None

    return wrapper


def warn(message: str) -> None:
    """Says what is odd and stops nothing."""
    print_log(message, logger='current', level=logging.WARNING)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def check_output(path: Path, folder: bool = False) -> None:
    """Checks that an output can be written, before what it is of is computed.

    Args:
        path: Of `--out`. What is there already stays as it is; folders are made.
        folder: Whether it is a folder of outputs, not a file.

    Raises:
        UserError: If it cannot be.
    """
    parent = path if folder else path.parent
    try:
        if path.exists() and path.is_dir() != folder:
            kinds = ('a folder', 'a file') if folder else ('a file', 'a folder')
            raise UserError(f'--out {path}: {kinds[0]} is expected, this is {kinds[1]}')
        parent.mkdir(parents=True, exist_ok=True)
        with path.open('a') if path.is_file() else tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f'--out {path} cannot be written: {error.strerror}') from error


# ---------------------------------------------------------------- options of the command line


def apply_options(cfg: Config, options: dict) -> None:
    """Merges `--cfg-options` into a config, in place.

    A key must be in the config, or be one that its place can take: an argument of the class that
    the dict's `type` names, or an argument of Runner. A string variable at the top of a config file
    (`data_root`, `checkpoint`) is replaced wherever its value was used: the file is evaluated
    before options are merged, so that changing the variable alone would change nothing.

    Raises:
        UserError: On a key that nothing would read, with the nearest one that something does.
    """
    dotted = {}
    for key, value in options.items():
        name, _, rest = key.partition('.')
        if name not in cfg or not _is_variable(cfg, name):
            dotted[key] = value
        elif isinstance(cfg[name], str) and isinstance(value, str) and not rest:
            _replace_string(cfg, cfg[name], value)
            cfg[name] = value
        else:
            # The value can have been changed since, so that places of the same name count too.
            places = [p for p, v in walk(cfg) if p.endswith(f'.{name}') or _equal(v, cfg[name])]
            places = [p for p in places if p != name]
            if places:
                use = ', '.join('.'.join(filter(None, [p, rest])) for p in places[:3])
                raise UserError(
                    f'--cfg-options {key}: {name} is a variable of the config file, '
                    f'used before options are merged; set where it went: {use}'
                )
            dotted[key] = value
    for key in dotted:
        _check_key(cfg, key)
    cfg.merge_from_dict(dotted)


def _equal(value: object, variable: object) -> bool:
    """Whether a value is a variable's; bases mark only the latter with the scope they are from."""
    if isinstance(value, dict) and isinstance(variable, dict):
        value, variable = (
            {k: v for k, v in d.items() if k != '_scope_'} for d in (value, variable)
        )
    return type(value) is type(variable) and value == variable


def _is_variable(cfg: Config, name: str) -> bool:
    if name == 'data_preprocessor':  # Runner's is a default: the model's own goes first
        return 'data_preprocessor' in cfg.get('model', {})
    return name not in _runner_fields()


def _runner_fields() -> set[str]:
    return set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'} | READ_FROM_CONFIG


def _replace_string(node: dict | list, old: str, new: str) -> None:
    """Replaces `old`, also at the start of a path, in every string below `node`, in place."""
    for key in range(len(node)) if isinstance(node, list) else list(node):
        value = node[key]
        if isinstance(value, str) and value == old:
            node[key] = new
        elif isinstance(value, str) and value.startswith(old.rstrip('/') + '/'):
            node[key] = new.rstrip('/') + value[len(old.rstrip('/')) :]
        elif isinstance(value, (dict, list)):
            _replace_string(value, old, new)


@own_errors_only
def _check_key(cfg: Config, key: str) -> None:
    node, path = cfg, ''
    for part in key.split('.'):
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f'--cfg-options {key}: {path} is a list of {len(node)} '
                    f'and is followed by an index from 0 to {len(node) - 1}, not by {part!r}'
                )
            part = int(part)
        elif not isinstance(node, (dict, Config)):
            raise UserError(f'--cfg-options {key}: {path} is {node!r}, which has no keys below it')
        elif part not in node:
            _check_new_key(cfg, node, path, part, key)
        new = {}  # what is below a new key is checked as far as its place tells what it takes
        node = node[part] if isinstance(part, int) else node.get(part, new)
        path = f'{path}.{part}'.lstrip('.')


def _check_new_key(cfg: Config, node: dict, path: str, part: str, key: str) -> None:
    takes = _known_keys(cfg, node, path)
    if takes is None:
        # A dict of free keys, say model.test_cfg: only what looks like a slip is refused.
        if not difflib.get_close_matches(part, list(node), n=1, cutoff=0.85):
            return
        takes = set()
    if part in takes:
        return
    candidates = {p for p, _ in walk(cfg)} | {f'{path}.{name}'.lstrip('.') for name in takes}
    nearest = difflib.get_close_matches(key, sorted(candidates), n=1, cutoff=0)
    raise UserError(f'--cfg-options {key}: no such key in the config; the nearest is {nearest[0]}')


def _known_keys(cfg: Config, node: dict, path: str) -> set[str] | None:
    """Keys that a dict of the config can have; None if it can have any."""
    loops = {'val_cfg': ValLoop, 'test_cfg': TestLoop}
    if not path:
        return _runner_fields()
    if path in LOADERS:
        return accepted_arguments(DataLoader) | READ_BY_MMENGINE
    if path == 'randomness':
        return accepted_arguments(Runner.set_randomness)
    if path == 'auto_scale_lr':
        return {'enable', 'base_batch_size'}
    if path == 'train_cfg' and 'type' not in node:
        loop = EpochBasedTrainLoop if node.get('by_epoch') else IterBasedTrainLoop
        return accepted_arguments(loop) | {'type', 'by_epoch'}
    found = loops[path] if path in loops and 'type' not in node else resolve(node, cfg)
    names = accepted_arguments(found) if found is not None else None
    return names if names is None else names | READ_BY_MMENGINE


def resolve(node: dict, cfg: Config) -> type | None:
    """The class (or function) that a dict's `type` names, or None if there is none."""
    name = node.get('type')
    if not isinstance(name, str):
        return name
    if '.' not in name:
        name = f'{node.get("_scope_", cfg.get("default_scope", "mmengine"))}.{name}'
    for registry in (
        registries.MODELS,
        registries.DATASETS,
        registries.TRANSFORMS,
        registries.HOOKS,
        registries.METRICS,
        registries.OPTIMIZERS,
        registries.OPTIM_WRAPPERS,
        registries.PARAM_SCHEDULERS,
        registries.LOOPS,
        registries.DATA_SAMPLERS,
        registries.FUNCTIONS,
        registries.TASK_UTILS,
        registries.VISUALIZERS,
        registries.VISBACKENDS,
        registries.LOG_PROCESSORS,
    ):
        try:
            found = registry.get(name)
        except RuntimeError:  # newer MMEngine raises where older ones give None
            continue
        if found is not None:
            return found
    return None


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


# ---------------------------------------------------------------- datasets


@own_errors_only
def check_datasets(cfg: Config, loaders: Iterable[str]) -> None:
    """Checks that the files of datasets exist and that the heads have their number of classes.

    Args:
        cfg: The config.
        loaders: Those of `train_dataloader`, `val_dataloader`, `test_dataloader` that will be used.

    Raises:
        UserError: Names what is missing, the expected tree and the variable to set.
    """
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for path, dataset in innermost_datasets(cfg[loader]['dataset'], f'{loader}.dataset'):
            _check_files(cfg, path, dataset)
            _check_suffix(cfg, path, dataset)
            _check_class_count(cfg, dataset)
        evaluator = cfg.get(loader.replace('dataloader', 'evaluator'))
        for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
            ann_file = metric.get('ann_file') if isinstance(metric, dict) else None
            if ann_file and '://' not in ann_file and not Path(ann_file).is_file():
                name = loader.replace('dataloader', 'evaluator')
                raise UserError(
                    f'annotation file {ann_file} not found ({name}.ann_file, {metric["type"]})'
                )


def innermost_datasets(dataset: dict, path: str = 'dataset') -> Iterator[tuple[str, dict]]:
    """(path, dict) of the datasets inside RepeatDataset, ConcatDataset and other wrappers."""
    if isinstance(dataset.get('dataset'), dict):
        yield from innermost_datasets(dataset['dataset'], f'{path}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for index, part in enumerate(dataset['datasets']):
            yield from innermost_datasets(part, f'{path}.datasets.{index}')
    else:
        yield path, dataset


def _check_files(cfg: Config, path: str, dataset: dict) -> None:
    root = dataset.get('data_root') or ''
    if dataset.get('backend_args') or '://' in root:
        return  # not on this machine's file system
    kind = str(dataset.get('type', '')).rpartition('.')[2]
    cls = resolve(dataset, cfg)
    parameters = inspect.signature(cls).parameters if cls is not None else {}
    if 'download' in parameters and dataset.get('download', parameters['download'].default):
        return  # mmpretrain's CIFAR and MNIST fetch themselves

    folders = _folders(dataset)
    ann_file = dataset.get('ann_file')
    missing = root if root and not Path(root).is_dir() else None
    for folder in folders:
        here = Path(root, folder)
        missing = missing or (None if here.is_dir() and any(here.iterdir()) else str(here))
    if ann_file and not Path(root, ann_file).exists():
        missing = missing or str(Path(root, ann_file))
    if missing is None:
        return
    standard, tree = TREES.get(kind, ({}, ''))
    name = standard.get(folders[0]) if folders else None
    if name is None:
        classes = kind == 'CustomDataset' and not ann_file
        parts = [f'{folder}/CLASS/*' if classes else f'{folder}/*' for folder in folders]
        tree = ' and '.join(parts + ([ann_file] if ann_file else []))
    is_file = ann_file and missing == str(Path(root, ann_file))
    what = 'annotation file' if is_file else 'dataset folder'
    state = 'is empty' if Path(missing).is_dir() else 'not found'
    raise UserError(
        f'{what} {missing} {state} ({path}, {kind}); expected in {root or "."}: {tree}; '
        f'{_how_to_prepare(name, dataset)}'
        f'if the data is elsewhere: --cfg-options {_variable(cfg, path, dataset)}=PATH'
    )


@own_errors_only
def _check_suffix(cfg: Config, path: str, dataset: dict) -> None:
    """Checks that a segmentation dataset without a list finds pictures by their suffix."""
    cls = resolve(dataset, cfg)
    parameters = inspect.signature(cls).parameters if cls is not None else {}
    if 'img_suffix' not in parameters or dataset.get('ann_file') or dataset.get('backend_args'):
        return
    suffix = dataset.get('img_suffix', parameters['img_suffix'].default)
    folder = Path(dataset.get('data_root') or '', (dataset.get('data_prefix') or {})['img_path'])
    found = Counter()
    for _, _, files in os.walk(folder, followlinks=True):
        if any(file.endswith(suffix) for file in files):
            return  # as a rule in the first folder; no other is read
        found.update(Path(file).suffix for file in files)
    if not found:
        return
    total, (count, other) = sum(found.values()), max((n, s) for s, n in found.items())
    raise UserError(
        f'no file in {folder} ends in {suffix!r}; {count} of {total} end in {other!r}: set '
        f'img_suffix ({path}.img_suffix={other})'
    )


def empty_dataset(error: ValueError) -> str | None:
    """What to say of the error with which MMEngine builds a dataset that has no sample left."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if frame.f_code.co_name == '_serialize_data' and isinstance(dataset, BaseDataset):
            names = dataset.metainfo.get('classes') or ()
            shown = ', '.join(map(repr, names[:3])) + (', …' if len(names) > 3 else '')
            where = dataset.ann_file or dataset.data_prefix
            return (
                f'{type(dataset).__name__} finds no sample in {where}: no annotation is of its '
                f'{len(names)} classes ({shown}), or none passes its filter_cfg; for classes of '
                "your own set metainfo=dict(classes=('…',)) of the dataset"
            )
    return None


def _how_to_prepare(name: str | None, dataset: dict) -> str:
    """What to run for a publisher's data; nothing for data of one's own in the same tree."""
    if name is None or (dataset.get('metainfo') or {}).get('classes'):
        return ''
    root = dataset.get('data_root') or '.'
    published = DATASETS[name]
    folder = '' if Path(root) == Path(published.root) else f' --root {root}'
    command = f'python tools/prepare_data.py {name}{folder}'
    if published.archives:
        return f'get it with {command} --download; '
    return f'{command} says how to get it; '


def _folders(dataset: dict) -> list[str]:
    """Folders below data_root that a dataset reads."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or {}
    prefixes = [prefix] if isinstance(prefix, str) else [p for p in prefix.values() if p]
    if isinstance(prefix, dict) and 'sub_data_root' in prefix:
        parts = dataset.get('img_subdir', 'JPEGImages'), dataset.get('ann_subdir', 'Annotations')
        prefixes = [f'{prefix["sub_data_root"].rstrip("/")}/{part}' for part in parts]
    return [p.rstrip('/') for p in prefixes if '://' not in p]


def _variable(cfg: Config, path: str, dataset: dict) -> str:
    """The key that moves a dataset: a variable at the top of the config file if there is one."""
    root = dataset.get('data_root')
    if not root:
        return f'{path}.data_prefix'
    names = [n for n, v in cfg.items() if v == root and _is_variable(cfg, n)]
    return names[0] if names else f'{path}.data_root'


def _check_class_count(cfg: Config, dataset: dict) -> None:
    count = _class_count(cfg, dataset)
    if count is None:
        return
    if 'language_model' in cfg.model:
        return  # classes are words there, and num_classes is a number of tokens
    found = {}
    for path, part in walk(cfg.model, 'model'):
        is_head = isinstance(part, dict) and HEADS.fullmatch(path)
        if is_head and str(part.get('type')).rpartition('.')[2] not in OTHER_CLASSES:
            found[f'{path}.num_classes'] = part.get('num_classes') or count
    wrong = [path for path, value in found.items() if value != count]
    if not wrong:
        return
    kind = str(dataset.get('type', '')).rpartition('.')[2]
    fix = ' '.join(f'{path}={count}' for path in wrong)
    message = f'{wrong[0]} is {found[wrong[0]]}, but {kind} has {count} classes'
    # Outputs to spare learn nothing. MMDetection's metrics cannot name the class of one.
    if all(found[path] > count for path in wrong) and cfg.get('default_scope') != 'mmdet':
        warn(f'{message}: the others will not be trained (--cfg-options {fix})')
        return
    own = dataset.get('metainfo') or dataset.get('classes')
    names = '' if own else " (or, for classes of your own, metainfo=dict(classes=('…',)) of it)"
    raise UserError(f'wrong number of classes: {message}; set --cfg-options {fix}{names}')


def _class_count(cfg: Config, dataset: dict) -> int | None:
    """Number of classes of a dataset, its annotations unread; None if that is not known."""
    metainfo = dataset.get('metainfo') or {}
    classes = dataset.get('classes') or metainfo.get('classes')
    if classes is None:
        known = getattr(resolve(dataset, cfg), 'METAINFO', {})
        if 'thing_classes' in known:
            return None  # panoptic heads share the classes: things here, stuff there
        classes = known.get('classes')
    if isinstance(classes, str):
        if not Path(classes).is_file():  # of names, which MMEngine reads
            raise UserError(
                f'classes of {dataset.get("type")} is the text {classes!r}, whose letters would be '
                f'the classes: write ({classes!r},), with the comma'
            )
        return len(Path(classes).read_text().splitlines())
    if isinstance(classes, (list, tuple)):
        return len(classes)
    kind = str(dataset.get('type', '')).rpartition('.')[2]
    folder = Path(dataset.get('data_root') or '', *_folders(dataset)[:1])
    if classes is None and kind == 'CustomDataset' and not dataset.get('ann_file'):
        return sum(entry.is_dir() for entry in folder.iterdir())
    return None


# ---------------------------------------------------------------- everything else


@own_errors_only
def check_replaced_backbone(cfg: Config) -> None:
    """Checks that one of our backbones does not get the weights' name that a base has for its own.

    mmseg writes a model's `pretrained` into the backbone, whose class takes no such argument.

    Raises:
        UserError: Says what to set.
    """
    pretrained, backbone = cfg.model.get('pretrained'), cfg.model.get('backbone')
    kind = resolve(backbone, cfg) if isinstance(backbone, dict) else None
    if isinstance(pretrained, str) and getattr(kind, '__module__', '').startswith('mmslak.'):
        raise UserError(
            f'model.pretrained is {pretrained}, which a base of the config has for its own '
            f'backbone and not for {kind.__name__}: set pretrained=None in the model '
            '(--cfg-options model.pretrained=None); weights of one of ours go into '
            "backbone.init_cfg=dict(type='Pretrained', checkpoint=…)"
        )


@own_errors_only
def check_pretrained(cfg: Config) -> None:
    """Checks that the files of `init_cfg=dict(type='Pretrained', …)` anywhere in the model exist.

    Raises:
        UserError: Says where to get the file and how to train without.
    """
    for path, value in list(walk(cfg['model'], 'model')):
        file, key = None, path
        if is_pretrained(value):
            file = value.get('checkpoint') or '(no checkpoint given)'
            key = path if path.endswith('init_cfg') else f'{path}.checkpoint'
            key = re.sub(r'init_cfg\.\d+\.checkpoint$', 'init_cfg', key)  # of a list
        elif path.endswith('.pretrained') and isinstance(value, str):
            file = value
        if file is None or '://' in file or Path(file).is_file():
            continue
        raise UserError(
            f'pretrained weights {file} not found ({path}); {_how_to_get(Path(file))}, '
            f'or train without: --cfg-options {key}=None'
        )


def _how_to_get(file: Path) -> str:
    """What to run for released weights."""
    name = released.name_of(file.name)
    if name is None:
        return 'put them there'
    folder = '' if str(file.parent) == released.FOLDER else f' --out {file.parent}'
    link = released.RELEASED[name].link
    return f'get them with python tools/get_checkpoint.py {name}{folder} (released at {link})'


@own_errors_only
def check_scope(cfg: Config) -> None:
    """Checks that the library of a config's default_scope is installed.

    Raises:
        UserError: If not.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if importlib.util.find_spec(scope) is None:
        raise UserError(f"the config's default_scope is {scope!r}, but {scope} is not installed")
