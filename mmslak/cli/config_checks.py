"""Checks of a config before anything is built."""

import inspect
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmengine import registry
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import init_default_scope

from mmslak.apis.config import class_name, innermost_datasets, resolve, walk
from mmslak.apis.options import is_variable
from mmslak.checkpoints import released
from mmslak.checkpoints.pretrained import is_pretrained
from mmslak.cli.census import unloaded
from mmslak.datasets.catalog import DATASETS
from mmslak.datasets.census import take_census
from mmslak.datasets.class_names import class_names, classes_as_text, metainfo
from mmslak.datasets.findings import of, quoted
from mmslak.errors import UserError, own_errors_only, warn
from mmslak.models.teacher import is_distilled

# Parts of a model whose num_classes is the dataset's.
HEADS = re.compile(
    r'model\.(student\.)?(data_preprocessor|(roi_head\.)?(decode|auxiliary|bbox|mask|mask_iou)_head(\.\d+)?|head)'
)
# Heads whose num_classes is not the number of the dataset's classes: STDCHead learns edges, and
# SideAdapterCLIPHead the words of its text encoder.
OTHER_CLASSES = ('STDCHead', 'SideAdapterCLIPHead')
# Methods of datasets in which the files turn out not to fit.
LOADING = ('_serialize_data', 'load_data_list')
# Trees of the datasets that our configs use, each with the folders that tell the standard tree and
# what `mmslak prepare-data` calls their data.
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
            _check_class_count(cfg, dataset)
            if loader == 'train_dataloader':
                _check_masks(cfg, path, dataset)
        _check_evaluator(cfg, loader.replace('dataloader', 'evaluator'))


def _check_masks(cfg: Config, path: str, dataset: dict) -> None:
    """Checks that masks are loaded where a mask head learns them."""
    models = {'model': cfg.model, 'model.roi_head': cfg.model.get('roi_head') or {}}
    heads = [
        f'{name}.mask_head'
        for name, part in models.items()
        # A cascade may have a list of them. BoxInst learns masks from boxes.
        if part.get('mask_head') and 'BoxInstMaskHead' not in str(part['mask_head'])
    ]
    # Other transforms that load annotations have masks by default, or are a user's own.
    loads = {
        number: transform
        for number, transform in enumerate(dataset.get('pipeline') or [])
        if isinstance(transform, dict) and class_name(transform) == 'LoadAnnotations'
    }
    if not heads or not loads or any(one.get('with_mask') for one in loads.values()):
        return
    raise UserError(
        f'{heads[0]} learns masks, which LoadAnnotations of {path}.pipeline does not load: '
        f'set --cfg-options {path}.pipeline.{min(loads)}.with_mask=True; for data with boxes '
        'alone use a config without a mask head, such as mmslak::faster_rcnn_slak_t_voc07.py'
    )


def _check_evaluator(cfg: Config, name: str) -> None:
    metrics = cfg.get(name)
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        ann_file = metric.get('ann_file') if isinstance(metric, dict) else None
        if ann_file and '://' not in ann_file and not Path(ann_file).is_file():
            raise UserError(
                f'annotation file {ann_file} not found ({name}.ann_file, {metric["type"]})'
            )


def _parameters(cfg: Config, dataset: dict) -> Mapping[str, inspect.Parameter]:
    """What the class of a dataset takes; nothing if there is no such class."""
    found = resolve(dataset, cfg)
    return {} if found is None else inspect.signature(found).parameters


def _check_files(cfg: Config, path: str, dataset: dict) -> None:
    root = dataset.get('data_root') or ''
    if dataset.get('backend_args') or '://' in root:
        return  # not on this machine's file system
    parameters = _parameters(cfg, dataset)
    if 'download' in parameters and dataset.get('download', parameters['download'].default):
        return  # mmpretrain's CIFAR and MNIST fetch themselves

    kind, folders, ann_file = class_name(dataset), _folders(dataset), dataset.get('ann_file')
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


def build_dataset(cfg: Config, loader: str) -> BaseDataset:
    """Builds the dataset of a loader of the config.

    Raises:
        UserError: If it cannot be built.
    """
    dataset = cfg[loader].dataset
    try:
        return registry.DATASETS.build(dataset)
    except Exception as error:  # a dataset is a program: it can raise anything
        text = empty_dataset(error) or f'{type(error).__name__}: {error}'
        what = f'{loader}.dataset ({dataset.get("type")}) cannot be built'
        raise UserError(f'{what}: {text}') from error


def empty_dataset(error: Exception) -> str | None:
    """A message for the error of a dataset that finds nothing in its files; else None.

    MMEngine raises it if no sample is left, and mmpretrain and mmdet if the files do not fit.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if isinstance(dataset, BaseDataset) and frame.f_code.co_name in LOADING:
            return _why_empty(dataset) or (
                _sample_left_nowhere(dataset) if frame.f_code.co_name == '_serialize_data' else None
            )
    return None


def _why_empty(dataset: BaseDataset) -> str | None:
    """What the census says; a fault of its own is none."""
    try:
        findings = take_census(dataset).findings
    except Exception:
        return None
    return next((finding.message for finding in findings if finding.stops), None)


def _sample_left_nowhere(dataset: BaseDataset) -> str:
    names = dataset.metainfo.get('classes') or ()
    return (
        f'{type(dataset).__name__} finds no sample in {dataset.ann_file or dataset.data_prefix}: '
        f'no annotation is of its {len(names)} classes ({quoted(names, 3)}), or none passes its '
        "filter_cfg; for classes of your own set metainfo=dict(classes=('…',)) of the dataset"
    )


def _how_to_prepare(name: str | None, dataset: dict) -> str:
    """Which command gets published data; '' for a user's own data in the same tree."""
    if name is None or (dataset.get('metainfo') or {}).get('classes'):
        return ''
    root = dataset.get('data_root') or '.'
    published = DATASETS[name]
    folder = '' if Path(root) == Path(published.root) else f' --root {root}'
    command = f'mmslak prepare-data {name}{folder}'
    if published.archives:
        return f'get it with {command} --download; '
    return f'{command} says how to get it; '


def _folders(dataset: dict) -> list[str]:
    """Folders below data_root that a dataset reads."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or {}
    prefixes = [prefix] if isinstance(prefix, str) else [p for p in prefix.values() if p]
    if isinstance(prefix, dict) and 'sub_data_root' in prefix:
        parts = dataset.get('img_subdir', 'JPEGImages'), dataset.get('ann_subdir', 'Annotations')
        prefixes = [os.path.join(prefix['sub_data_root'], part) for part in parts]
    return [p.rstrip('/') for p in prefixes if '://' not in p]


def _variable(cfg: Config, path: str, dataset: dict) -> str:
    """The option that sets a dataset's folder: a variable of the config file if there is one."""
    root = dataset.get('data_root')
    if not root:
        return f'{path}.data_prefix'
    names = [n for n, v in cfg.items() if v == root and is_variable(cfg, n)]
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
        if is_head and class_name(part) not in OTHER_CLASSES:
            found[f'{path}.num_classes'] = part.get('num_classes') or count
    wrong = [path for path, value in found.items() if value != count]
    if not wrong:
        return
    fix = ' '.join(f'{path}={count}' for path in wrong)
    message = f'{wrong[0]} is {found[wrong[0]]}, but {class_name(dataset)} has {of(count, "class")}'
    # Spare outputs do no harm, except in MMDetection, whose metrics look up a class for each.
    if all(found[path] > count for path in wrong) and cfg.get('default_scope') != 'mmdet':
        warn(f'{message}: the others will not be trained (--cfg-options {fix})')
        return
    raise UserError(
        f'wrong number of classes: {message}; {_which_classes(cfg, dataset, found[wrong[0]])}set '
        f'--cfg-options {fix}'
    )


def _which_classes(cfg: Config, dataset: dict, outputs: int) -> str:
    """Advice from the classes that the files have, where the dataset looks for others."""
    try:
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        built = unloaded(dataset)
        names, wanted = take_census(built).names, class_names(built)
    except Exception:  # a fault of the census must not hide the number
        names, wanted = [], []
    own = dataset.get('metainfo') or dataset.get('classes')
    if not set(names) <= set(wanted):
        heads = '' if outputs == len(names) else f' and num_classes={len(names)} of the heads'
        return (
            f'the classes of its files are {quoted(names)}: set {metainfo(names)} of the '
            f'dataset{heads}; if its {len(wanted)} classes are meant, '
        )
    return '' if own else "for classes of your own, set metainfo=dict(classes=('…',)) of it, or "


def _class_count(cfg: Config, dataset: dict) -> int | None:
    """Number of classes of a dataset, without reading annotations; None if it is unknown."""
    metainfo = dataset.get('metainfo') or {}
    classes = dataset.get('classes') or metainfo.get('classes')
    if classes is None:
        known = getattr(resolve(dataset, cfg), 'METAINFO', {})
        if 'thing_classes' in known:
            return None  # panoptic heads share the classes: things here, stuff there
        classes = known.get('classes')
    if isinstance(classes, str):
        if not Path(classes).is_file():  # of names, which MMEngine reads
            raise UserError(classes_as_text(class_name(dataset), classes))
        return len(Path(classes).read_text().splitlines())
    if isinstance(classes, (list, tuple)):
        return len(classes)
    if classes is None and class_name(dataset) == 'CustomDataset' and not dataset.get('ann_file'):
        folder = Path(dataset.get('data_root') or '', *_folders(dataset)[:1])
        return sum(entry.is_dir() for entry in folder.iterdir())
    return None


@own_errors_only
def check_replaced_backbone(cfg: Config) -> None:
    """Checks that `model.pretrained` of a base is not left for one of our backbones.

    mmseg hands `pretrained` on to the backbone, and our classes take no such argument.

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
def check_schedules(cfg: Config) -> None:
    """Checks that schedules end after they begin, as where a run was made shorter by hand.

    Raises:
        UserError: Names the schedule.
    """
    for path, value in walk(dict(param_scheduler=cfg.get('param_scheduler') or [])):
        if not isinstance(value, dict) or value.get('end') is None:
            continue
        begin, end = value.get('begin', 0), value['end']
        if begin >= end:
            raise UserError(
                f'{path} ({value.get("type")}) begins at {begin} and ends at {end}: a schedule '
                'has to end after it begins; mmslak train CONFIG --iterations 20 makes a run '
                'shorter, with all of its schedules'
            )


@own_errors_only
def check_pretrained(cfg: Config) -> None:
    """Checks that the files of `init_cfg=dict(type='Pretrained', …)` anywhere in the model exist.

    A teacher, whose weights are all in one file, has to have that alone.

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
        elif path == 'model.teacher_checkpoint':
            file = value or '(no checkpoint given)'
        if file is None or '://' in file or Path(file).is_file():
            continue
        if path.startswith('model.teacher.') and is_distilled(cfg.model):
            continue
        without = f', or train without: --cfg-options {key}=None'
        raise UserError(
            f'pretrained weights {file} not found ({path}); {_how_to_get(Path(file))}'
            f'{"" if path == "model.teacher_checkpoint" else without}'
        )


def _how_to_get(file: Path) -> str:
    """Which command gets released weights."""
    name = released.name_of(file.name)
    if name is None:
        return 'put them there'
    folder = '' if str(file.parent) == released.FOLDER else f' --out {file.parent}'
    link = released.RELEASED[name].link
    return f'get them with mmslak get-checkpoint {name}{folder} (released at {link})'
