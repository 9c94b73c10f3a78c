"""The text of a config over one of ours, for data that was recognised, and the lists it reads."""

import ast
import contextlib
import ctypes
import json
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median

from mmslak.checkpoints import released
from mmslak.datasets.formats import DataSet, label_maps
from mmslak.datasets.formats.description import SPLITS, Sample
from mmslak.datasets.formats.files import list_files
from mmslak.datasets.formats.objects import to_coco
from mmslak.datasets.palette import distinct_colours

# What each of our configs reads; the first one of a kind is its default.
LIKE = {
    'upernet_slak_t_ade20k': ('segmentation',),
    'cascade_mask_rcnn_slak_t_coco': ('masks',),
    'faster_rcnn_slak_t_voc07': ('boxes', 'masks'),
    'slak_t_imagenet': ('classification',),
}
LIBRARIES = dict(zip(LIKE, ('mmseg', 'mmdet', 'mmdet', 'mmpretrain')))
TITLES = dict(zip(LIKE, ('UperNet', 'Cascade Mask R-CNN', 'Faster R-CNN', 'Classifier')))
WEIGHTS = 'slak_tiny'  # of `mmslak get-checkpoint`
WIDTH = 100
MOST = 40  # lines of a config; names of classes that make it longer are in a file
_EVERY = 'epochs from one validation and checkpoint to the next'
LISTS = '{{ fileDirname }}'  # MMEngine puts the folder of the config file in its place
WRITTEN = 'Written by mmslak new-config.'  # in the first line of a config
SETS = 'data_sets.py'  # beside a config: its data sets, where a split has several
COLOURS = 'palette.py'  # beside a config: the colours of its classes, where there are many
FEW = 11  # classes whose colours are in the config itself
NAMED = 12  # classes that a command names at most


@dataclass
class Machine:
    """What there is to train with.

    Attributes:
        memory: Gigabytes of the GPU, or of the machine without one.
        has_gpu: Whether there is a GPU.
        weights: The file of pre-trained weights; None if it is not here.
    """

    memory: float
    has_gpu: bool
    weights: str | None


def this_machine() -> Machine:
    """The machine that this process runs on."""
    file = released.RELEASED[WEIGHTS].file
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'torch')
    hub = Path(os.environ.get('TORCH_HOME') or cache, 'hub/checkpoints').expanduser()
    places = Path(released.FOLDER, file), hub / file
    weights = next((os.path.abspath(path) for path in places if path.is_file()), None)
    gpu = _gpu_memory()
    total = gpu or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return Machine(total / 2**30, gpu > 0, weights)


def _gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one."""
    if sys.platform == 'linux' and not Path('/dev/kfd').exists():  # which ROCm needs
        try:
            ctypes.CDLL('libcuda.so.1')
        except OSError:
            return 0  # without the driver there is none, and torch takes seconds to load
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def default_like(kind: str) -> str:
    """The one of our configs that a kind of data starts from."""
    return next(name for name, kinds in LIKE.items() if kind in kinds)


def write_config(
    data: DataSet, like: str, machine: Machine, folder: str
) -> tuple[str, dict[str, str]]:
    """The text of a config and of the files beside it.

    Args:
        data: With train and val, and classes.
        like: A key of LIKE that reads the kind of data.
        machine: What to train with.
        folder: Name of the folder beside the config that the files go into.

    Returns:
        (config, {name of a file in the folder: text})
    """
    write = dict(zip(LIKE, (_segmentor, _detector, _detector, _classifier)))[like]
    files = {}
    names = {split: _datasets(data, split, files) for split in SPLITS if data.splits.get(split)}
    body = write(data, like, machine, names)
    counts = ', '.join(f'{len(data.splits[split])} {split}' for split in names)
    bases = [f'mmslak::{like}.py']
    several = {split: parts for split, parts in names.items() if len(parts) > 1}
    if several:
        files[SETS] = _several_sets(several)
        bases.append(f'{folder}/{SETS}')
    if data.kind == 'segmentation' and len(data.classes) > FEW:
        colours = _wrapped(list(map(str, _palette(data))), 4)
        files[COLOURS] = '\n'.join(
            ['"""The colours of classes."""', '', 'palette = [', *colours, ']', '']
        )
        bases.append(f'{folder}/{COLOURS}')
    head = [
        f'"""{TITLES[like]} with SLaK-T; {counts} pictures. {WRITTEN}"""',
        '',
        f'_base_ = {bases}',
        f'data_root = {os.path.abspath(data.root)!r}  # absolute: commands work in any folder',
    ]
    classes = _tuple('classes = ', [repr(name) for name in data.classes])
    if len(classes) > 1 and len(head) + 1 + len(classes) + len(body) > MOST:
        files['classes.txt'] = ''.join(f'{name}\n' for name in data.classes)
        classes = ["classes = f'{lists}/classes.txt'"]
    if files:
        head.append(f'lists = "{LISTS}/{folder}"  # what was written beside this file')
    lines = [*head, *classes, *body]
    if len(lines) > MOST:
        lines = list(filter(None, lines))
    return '\n'.join([*lines, '']), files


def lists_of(config: Path) -> Path:
    """The folder of what is written beside a config."""
    return config.with_name(f'{config.stem}_data')


def command_of(cfg: object, source: str = '') -> str | None:
    """The command that writes a config anew, and with it the lists of its data.

    Args:
        cfg: A `Config` that was read from a file.
        source: The list or annotation file of one of its data sets.

    Returns:
        None if `mmslak new-config` has not written the file, or if the source is a list of the
        data itself, which it would read and not write.
    """
    file = Path(cfg.filename or '')
    text = file.read_text(encoding='utf-8', errors='replace') if file.is_file() else ''
    if WRITTEN not in text.partition('\n')[0]:
        return None
    is_beside = os.path.abspath(os.path.dirname(source)) == os.path.abspath(lists_of(file))
    if source.endswith('.txt') and not is_beside:
        return None
    base = re.search(r"'mmslak::(\w+)\.py'", text)
    if not base or base[1] not in LIKE or not {'data_root', 'classes', 'data'} <= set(cfg):
        return None  # a person has rewritten it
    like = base[1]
    words = ['mmslak', 'new-config', cfg.data_root, '--out', str(file), '--force']
    words += ['--like', like] if len(LIKE[like]) > 1 else []
    if 'segmentation' not in LIKE[like]:
        return shlex.join(words)
    words += ['--ignore', '0'] if cfg.data.get('reduce_zero_label') else []
    names = cfg.classes
    if isinstance(names, str) or len(names) > NAMED or any(',' in name for name in names):
        return f'{shlex.join(words)} --classes …'
    return shlex.join([*words, '--classes', ','.join(names)])


def names_in(config: Path) -> tuple[list[str], bool]:
    """The names of label maps in a config that `mmslak new-config` wrote, without running it.

    Returns:
        (names, whether 0 is no class); no names if it has not written the file.
    """
    text = config.read_text(encoding='utf-8', errors='replace') if config.is_file() else ''
    if WRITTEN not in text.partition('\n')[0]:
        return [], False
    beside = lists_of(config) / 'classes.txt'
    names = beside.read_text(encoding='utf-8').splitlines() if beside.is_file() else []
    found = re.search(r'^classes = (\(.*?\))$', text, re.MULTILINE | re.DOTALL)
    with contextlib.suppress(ValueError, SyntaxError):  # a person has rewritten it
        names = list(ast.literal_eval(found[1])) if found else names
    return names, 'reduce_zero_label=True' in text


# ---------------------------------------------------------------- the text


def _flat(parts: Iterable[str]) -> str:
    return ', '.join(parts)


def _wrapped(parts: Sequence[str], indent: int) -> list[str]:
    """Parts with commas between them, in lines as long as there is room."""
    lines = ['']
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 2 + indent > WIDTH:
            lines.append('')
        lines[-1] += f' {part},' if lines[-1] else f'{part},'
    return [' ' * indent + line for line in lines]


def _tuple(start: str, parts: Sequence[str], opens: str = '(', closes: str = ')') -> list[str]:
    """`start = (…)`, or with other brackets, in one line or more."""
    closes = f',{closes}' if len(parts) == 1 else closes
    flat = f'{start}{opens}{_flat(parts)}{closes}'
    if len(flat) <= WIDTH:
        return [flat]
    return _closed([f'{start}{opens}', *_wrapped(parts, 4)], closes)


def _dict(start: str, parts: Sequence[str], indent: int = 0) -> list[str]:
    """`start = dict(…)`, in one line or more."""
    flat = f'{start}dict({_flat(parts)})'
    if len(flat) + indent <= WIDTH:
        return [' ' * indent + flat]
    return _closed([f'{" " * indent}{start}dict(', *_wrapped(parts, indent + 4)], ')')


def _closed(lines: list[str], brackets: str) -> list[str]:
    """Lines whose last one ends with brackets instead of a comma."""
    return [*lines[:-1], lines[-1].removesuffix(',') + brackets]


def _settings(settings: dict) -> list[str]:
    """Arguments of a dict; the value of ann_file is text of Python."""
    parts = []
    for key, value in settings.items():
        nested = isinstance(value, dict)
        text = f'dict({_flat(_settings(value))})' if nested else repr(value)
        parts.append(f'{key}={value if key == "ann_file" else text}')
    return parts


def _common(names: dict[str, list[dict]]) -> dict:
    """Takes what all data sets have in common out of their settings, and returns it."""
    everything = [settings for datasets in names.values() for settings in datasets]
    first = everything[0]
    common = {k: v for k, v in first.items() if all(s.get(k) == v for s in everything)}
    for settings in everything:
        for key in common:
            del settings[key]
    return common


def _data(common: dict, meta: Sequence[str] = ('classes=classes',), *more: str) -> list[str]:
    """The settings that all data sets have in common."""
    rest = {key: value for key, value in common.items() if key != 'type'}
    parts = [f"type='{common['type']}'", 'data_root=data_root', f'metainfo=dict({_flat(meta)})']
    return _dict('data = ', [*parts, *_settings(rest), *more])


def _loader(name: str, datasets: list[dict], pipeline: str) -> list[str]:
    """A data loader; of several data sets, which a file beside the config has, or of one."""
    extra = [f'pipeline={pipeline}', '**data']
    start = f'{name}_dataloader = dict({"batch_size=batch, " if name == "train" else ""}dataset='
    if len(datasets) > 1:
        return [
            f"{start}dict(_delete_=True, type='ConcatDataset', datasets=[",
            f'    dict(one, {_flat(extra)}) for one in _base_.{name}_sets]))',
        ]
    parts = ['_delete_=True', *_settings(datasets[0]), *extra]
    return _closed([f'{start}dict(', *_wrapped(parts, 4)], '))')


def _several_sets(names: dict[str, list[dict]]) -> str:
    """The text of the file with the data sets of splits that have several."""
    lines = [
        '"""The data sets of a config: one for each suffix and each folder of pictures."""',
        '',
        f'lists = "{LISTS}"',
    ]
    for split, datasets in names.items():
        lines.append(f'{split}_sets = [')
        for settings in datasets:
            lines += _closed(_dict('', _settings(settings), 4), ',')
        lines.append(']')
    return '\n'.join([*lines, ''])


def _loaders(names: dict, train: str, test: str) -> list[str]:
    lines = _loader('train', names['train'], train) + _loader('val', names['val'], test)
    if 'test' not in names:
        return [*lines, 'test_dataloader = val_dataloader']
    one, *more = names['test']
    if more or len(names['val']) > 1 or one.keys() != names['val'][0].keys():
        return lines + _loader('test', names['test'], test)
    differs = {key: value for key, value in one.items() if value != names['val'][0][key]}
    parts = ["val_dataloader['dataset']", *_settings(differs)]
    return lines + _closed(_dict('test_dataloader = dict(dataset=', parts), ')')


def _weights(machine: Machine, default: bool = True) -> tuple[list[str], list[str]]:
    """From which weights training starts.

    Args:
        machine: Has the weights or not.
        default: Whether the base names weights and holds their zeros.

    Returns:
        (lines of the config, arguments of the model)
    """
    if machine.weights is None:
        note = f'# random weights; far better: mmslak get-checkpoint {WEIGHTS}, then --force'
        random = ['backbone=dict(init_cfg=None)'] if default else []
        return [f'custom_hooks = []  {note}'], random
    init = f"backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={machine.weights!r}))"
    if default:
        return [], [init]
    hook = "dict(type='mmslak.SparseTrainingHook', preset='finetune')"
    return [f'custom_hooks = [{hook}]  # keeps the zeros'], [init]


def _optimizer(published: str, at: int, machine: Machine, decays: bool) -> list[str]:
    """The learning rate, and no decay from layer to layer where all weights are random."""
    plain = ['paramwise_cfg=dict(decay_rate=1.0)'] if decays and not machine.weights else []
    rate = f'optimizer=dict(lr={published} * (batch / {at}) ** 0.5)'
    return _dict('optim_wrapper = ', [rate, *plain])


# ---------------------------------------------------------------- the four kinds of models


def _segmentor(data: DataSet, like: str, machine: Machine, names: dict) -> list[str]:
    count = len(data.splits['train'])
    shorter = median(min(sample.size) for sample in data.splits['train'])
    # About 4 GB for a picture of 512×512; the coarsest map needs two pictures for its batch norm.
    crop = 512 if machine.has_gpu and machine.memory > 10 else 256
    crop = min(crop, max(128, -(-int(shorter) // 32) * 32))
    batch = min(4, max(2, int(machine.memory / 4 * (512 / crop) ** 2))) if machine.has_gpu else 2
    steps = min(160000, max(2000, -(-128 * count // batch // 100) * 100))
    common = _common(names)
    zero, n = data.ignore_zero, len(data.classes)
    start, backbone = _weights(machine)
    palette, source = [], '_base_.palette'
    if n <= FEW:
        palette = _tuple('palette = ', list(map(str, _palette(data))), '[', ']')
        source = 'palette'
    return [
        f'crop, batch = {crop}, {batch}  # {_memory_note(machine, "512 and 4")}',
        '# Rule: each picture is seen 128 times, as published for ADE20K; 2,000 to 160,000 steps.',
        f'iterations = {steps}',
        'every = max(1, iterations // 10)  # steps from one validation and checkpoint to the next',
        '',
        *palette,
        *_data(common, ['classes=classes', f'palette={source}'], f'reduce_zero_label={zero}'),
        'train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline',
        # mmseg takes it from the data set then, and warns of anything else.
        'train_pipeline[1].reduce_zero_label = test_pipeline[2].reduce_zero_label = None'
        f'  # 0 is {"no class" if zero else "a class"}',
        'train_pipeline[2].scale = test_pipeline[1].scale = (4 * crop, crop)',
        'train_pipeline[3].crop_size = (crop, crop)',
        *_loaders(names, 'train_pipeline', 'test_pipeline'),
        *_dict(
            'model = ',
            [
                *backbone,
                'data_preprocessor=dict(size=(crop, crop))',
                f'decode_head=dict(num_classes={n})',
                f'auxiliary_head=dict(num_classes={n})',
                'test_cfg=dict(crop_size=(crop, crop), stride=(crop * 2 // 3, crop * 2 // 3))',
            ],
        ),
        *start,
        *_optimizer('1e-4', 16, machine, decays=True),
        'param_scheduler = [',
        "    dict(type='LinearLR', start_factor=1e-6, end=min(1500, every), by_epoch=False),",
        "    dict(type='PolyLR', power=1.0, begin=min(1500, every), end=iterations, "
        'by_epoch=False)]',
        'train_cfg = dict(max_iters=iterations, val_interval=every)',
        'default_hooks = dict(logger=dict(interval=10), checkpoint=dict(',
        "    interval=every, max_keep_ckpts=2, save_best='mIoU'))",
        'auto_scale_lr = dict(base_batch_size=batch)',
    ]


def _palette(data: DataSet) -> list[list[int]]:
    """The colours of the data, or some that differ; the background is black.

    mmseg would draw random ones, which are alike at times.
    """
    first = 0 if 'background' in data.classes[0].lower() else 1
    differ = distinct_colours(first + len(data.classes))[first:]
    return data.palette or [list(colour) for colour in differ]


def _detector(data: DataSet, like: str, machine: Machine, names: dict) -> list[str]:
    count, n = len(data.splits['train']), len(data.classes)
    masks = 'mask' in like
    batch = 2 if not machine.has_gpu or machine.memory > 14 else 1
    batch = min(batch, count)
    # Half as large without a GPU: a step of the published size takes minutes there.
    scale = (1333, 800) if machine.has_gpu else (667, 400)
    epochs = min(200, max(36, -(-4000 * batch // count)))
    common = _common(names)
    kind = common['type']
    start, backbone = _weights(machine)
    heads = f'bbox_head=dict(num_classes={n})'
    for split in names:
        training = dict(filter_cfg=dict(filter_empty_gt=True, min_size=32))
        names[split][0].update(training if split == 'train' else dict(test_mode=True))
    lines = [
        f'batch, scale = {batch}, {scale}  # {_memory_note(machine, "2 and (1333, 800)")}',
        '# Rule: 36 epochs as published; of few pictures more, for 4,000 steps, but 200 at most.',
        f'max_epochs = {epochs}',
        f'every = max(1, max_epochs // 12)  # {_EVERY}',
        '',
        *_data(common),
        '_base_.test_pipeline[1].scale = scale  # longer, shorter side; half: a quarter of time',
        f'_base_.train_pipeline[{4 if masks else 2}].scales = '
        '[(scale[1] * k // 25, scale[0]) for k in range(15, 26)]',
        *_loaders(names, '_base_.train_pipeline', '_base_.test_pipeline'),
    ]
    if kind == 'CocoDataset':
        where = {split: f'ann_file={_evaluated(names[split][0]["ann_file"])}' for split in names}
        own = [] if masks else ['_delete_=True', "type='CocoMetric'", "metric='bbox'"]
        lines += _dict('val_evaluator = ', [*own, where['val']])
        if 'test' in names:
            lines += _dict('test_evaluator = ', ['val_evaluator', where['test']])
        else:
            lines.remove('test_dataloader = val_dataloader')
            lines.append('test_dataloader, test_evaluator = val_dataloader, val_evaluator')
    if masks:
        lines.append(
            f'heads = [dict(head, num_classes={n}) for head in _base_.model.roi_head.bbox_head]'
        )
        heads = f'bbox_head=heads, mask_head=dict(num_classes={n})'
    best = 'coco/bbox_mAP' if kind == 'CocoDataset' else 'pascal_voc/mAP'
    return [
        *lines,
        *_dict('model = ', [*backbone, f'roi_head=dict({heads})']),
        *start,
        *_optimizer('2e-4' if masks else '1e-4', 16, machine, decays=masks),
        'param_scheduler = [',
        "    dict(type='LinearLR', start_factor=0.001, by_epoch=False,",
        f'         end=max(1, min(1000, {count} * max_epochs // batch // 10))),',
        "    dict(type='MultiStepLR', end=max_epochs, gamma=0.1,",
        '         milestones=[max_epochs * 3 // 4, max_epochs * 11 // 12])]',
        'train_cfg = dict(max_epochs=max_epochs, val_interval=every)',
        'default_hooks = dict(logger=dict(interval=10), checkpoint=dict(',
        f"    interval=every, max_keep_ckpts=2, save_best='{best}'))",
        'auto_scale_lr = dict(base_batch_size=batch)',
    ]


def _evaluated(ann_file: str) -> str:
    """The annotation file as the metric wants it, which knows no data_root."""
    if ann_file.startswith('f'):  # a file beside the config
        return ann_file
    return f'data_root + {"/" + ast.literal_eval(ann_file)!r}'


def _classifier(data: DataSet, like: str, machine: Machine, names: dict) -> list[str]:
    count, n = len(data.splits['train']), len(data.classes)
    batch = min(128, max(16, int(machine.memory) * 4)) if machine.has_gpu else 16
    batch = max(1, min(batch, count))
    epochs = min(300, max(30, -(-2000 * batch // count)))
    common = _common(names)
    start, backbone = _weights(machine, default=False)
    return [
        f'batch = {batch}  # {_memory_note(machine, "128")}',
        '# Rule: 30 epochs; of few pictures more, for 2,000 steps, but 300 at most.',
        f'max_epochs = {epochs}',
        f'every = max(1, max_epochs // 30)  # {_EVERY}',
        '',
        *_data(common),
        *_loaders(names, '_base_.train_pipeline', '_base_.test_pipeline'),
        f'val_evaluator = dict(topk=({"1, 5" if n > 5 else "1,"}))',
        'test_evaluator = val_evaluator',
        f'data_preprocessor = dict(num_classes={n})',
        '# Without mixup and cutmix, which are for training from random weights.',
        *_dict('model = ', [*backbone, f'head=dict(num_classes={n})', 'train_cfg=None']),
        *start,
        *_optimizer('2e-4', 128, machine, decays=False),
        'param_scheduler = [',
        "    dict(type='LinearLR', start_factor=1e-3, end=max(1, max_epochs // 10),",
        '         convert_to_iter_based=True),',
        "    dict(type='CosineAnnealingLR', begin=max(1, max_epochs // 10), end=max_epochs,",
        '         convert_to_iter_based=True)]',
        'train_cfg = dict(max_epochs=max_epochs, val_interval=every)',
        'default_hooks = dict(logger=dict(interval=10), checkpoint=dict(',
        "    interval=every, max_keep_ckpts=2, save_best='accuracy/top1'))",
        'auto_scale_lr = dict(base_batch_size=batch)',
    ]


def _memory_note(machine: Machine, otherwise: str) -> str:
    if machine.has_gpu:
        return f'for a GPU with {machine.memory:.0f} GB; less if its memory does not suffice'
    return f'for {machine.memory:.0f} GB of RAM and no GPU; on a GPU {otherwise}'


# ---------------------------------------------------------------- the data sets


def _datasets(data: DataSet, split: str, files: dict[str, str]) -> list[dict]:
    """Settings of the data sets of a split, and in `files` what they need.

    The value of ann_file is text of Python.
    """
    if split in data.direct:
        settings = dict(data.direct[split])
        if 'ann_file' in settings:
            settings['ann_file'] = repr(settings['ann_file'])
        return [settings]
    samples = data.splits[split]
    if data.kind == 'segmentation':
        return _pairs(data.root, split, samples, files)
    if data.kind == 'classification':
        files[f'{split}.txt'] = ''.join(f'{s.path} {s.label}\n' for s in samples)
        return [dict(type='CustomDataset', ann_file=_listed(f'{split}.txt'), data_prefix='')]
    content = to_coco(samples, data.classes)
    files[f'{split}.json'] = json.dumps(content, ensure_ascii=False)
    ann_file = _listed(f'{split}.json')
    return [dict(type='CocoDataset', ann_file=ann_file, data_prefix=dict(img=''))]


def _listed(name: str) -> str:
    return f"f'{{lists}}/{name}'"


def _pairs(root: Path, split: str, samples: list[Sample], files: dict[str, str]) -> list[dict]:
    """A data set for each pair of folders and suffixes; without a list where folders tell all."""
    groups = defaultdict(list)
    for sample in samples:
        *place, name = label_maps.parts(sample.path, sample.label)
        groups[tuple(place)].append(name)
    datasets = []
    for number, ((img, seg, *suffixes), names) in enumerate(groups.items(), 1):
        shared = os.path.commonpath([str(PurePosixPath(name).parent) for name in names])
        below, beside = (PurePosixPath(folder, shared).as_posix() for folder in (img, seg))
        there = [f for f in list_files(root / below) if f.endswith(suffixes[0])]
        there = [PurePosixPath(below, file).as_posix() for file in there]
        if len(groups) == 1 and there == [sample.path for sample in samples]:
            settings = dict(data_prefix=dict(img_path=below, seg_map_path=beside))
        else:
            file = f'{split}.txt' if len(groups) == 1 else f'{split}_{number}.txt'
            files[file] = ''.join(f'{name}\n' for name in names)
            prefix = dict(img_path=img, seg_map_path=seg)
            settings = dict(ann_file=_listed(file), data_prefix=prefix)
        suffixes = dict(zip(('img_suffix', 'seg_map_suffix'), suffixes))
        datasets.append(dict(type='BaseSegDataset', **settings, **suffixes))
    return datasets
