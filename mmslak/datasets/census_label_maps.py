"""Counts what label maps have to teach: one number per pixel."""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mmslak.datasets.census_table import Census, Progress, Row, size_range
from mmslak.datasets.class_names import class_names
from mmslak.datasets.findings import Finding, of, quoted
from mmslak.datasets.folders import absent_files, absent_pictures, names_below
from mmslak.datasets.guard import bare, loading_transforms
from mmslak.datasets.label_maps import INDICES, command, name_of
from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import first_few

SAMPLE = 500  # label maps that are read, unless all are wanted
MOST_COLOURS = 8  # that a message names


def count_label_maps(dataset: object, full: bool, progress: Progress) -> Census:
    """Counts the pixels of the classes in a sample of the label maps.

    Args:
        dataset: A data set of mmseg, which may not be loaded yet.
        full: Whether to read all label maps.
        progress: Shows the progress of a loop.
    """
    if any(type(reader).__name__ != 'LoadAnnotations' for reader in _readers(dataset)):
        return Census()  # labels of another form, which a transform of another library reads
    samples = _samples(dataset)
    if not samples:
        return Census(findings=[_no_picture(dataset)])
    census = Census(pictures=len(samples), unit='pixels', names=class_names(dataset))
    census.files = [sample['img_path'] for sample in samples]
    census.findings += _passed_over(dataset, samples)
    census.findings += _absent_pictures(dataset, census.files)
    files = [sample['seg_map_path'] for sample in samples if sample.get('seg_map_path')]
    if not files:
        return Census(pictures=len(samples))  # pictures of a test without labels
    absent = absent_files(files, dataset.data_prefix['seg_map_path'])
    if absent:
        census.findings.append(_absent(dataset, absent, len(files)))
        there = set(absent)
        files = [file for file in files if file not in there]
    census.findings += _without_picture(dataset, files)
    if files:
        chosen = files if full else evenly(files)
        seen = read_label_maps(chosen, _palettes_are_colours(dataset), progress)
        census.sampled = (len(chosen), len(files)) if len(chosen) < len(files) else None
        _judge(dataset, census, seen)
    return census


def evenly(files: list, count: int = SAMPLE) -> list:
    """At most `count` items of a list, from all parts of it and the same ones each time."""
    if len(files) <= count:
        return files
    return [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]


def _samples(dataset: object) -> list[dict]:
    if getattr(dataset, '_fully_initialized', False):
        return [dataset.get_data_info(index) for index in range(len(dataset))]
    return dataset.load_data_list()


# ---------------------------------------------------------------- files


def _no_picture(dataset: object) -> Finding:
    folder, suffix = dataset.data_prefix.get('img_path') or '.', dataset.img_suffix
    if _has_list(dataset):
        message = f'{dataset.ann_file} lists no picture'
        return Finding('no-picture', message, stops=True, files=(dataset.ann_file,))
    found = Counter(Path(file).suffix for file in names_below(folder))
    message = f'no picture in {folder} ends in {suffix!r}'
    if found:
        other, count = found.most_common(1)[0]
        message += (
            f'; {count} of {found.total()} files end in {other!r}: set '
            f'img_suffix={other!r} of the dataset'
        )
    return Finding('no-picture', message, stops=True, count=found.total())


def _passed_over(dataset: object, samples: list[dict]) -> list[Finding]:
    """Finds pictures of another suffix that have a label map."""
    if _has_list(dataset):
        return []
    folder, maps = (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    suffix, others = dataset.img_suffix, []
    if not folder or not maps:
        return []
    used = {os.path.relpath(sample['img_path'], folder) for sample in samples}
    for file in names_below(folder):
        stem, ending = os.path.splitext(file)
        if file in used or ending.lower() not in PICTURE_SUFFIXES or stem + suffix in used:
            continue
        label_map = os.path.join(maps, stem + dataset.seg_map_suffix)
        if os.path.isfile(label_map) and os.path.join(maps, file) != label_map:
            others.append(os.path.join(folder, file))
    if not others:
        return []
    message = (
        f'{of(len(others), "picture")} of {folder} with a label map ends in '
        f'{quoted(sorted({Path(file).suffix for file in others}))} and not in '
        f'img_suffix={suffix!r}, so that it is left out: give all pictures one suffix'
    )
    return [Finding.of_files('pictures-passed-over', message, sorted(others))]


def _absent_pictures(dataset: object, paths: list[str]) -> list[Finding]:
    if not _has_list(dataset):
        return []  # what is in a folder is there
    folder, looks_for = dataset.data_prefix.get('img_path'), f'img_suffix is {dataset.img_suffix!r}'
    return absent_pictures(paths, folder or '', dataset.ann_file, looks_for)


def _has_list(dataset: object) -> bool:
    """Whether a list names the pictures of a data set; otherwise they are those of its folder."""
    return bool(dataset.ann_file) and not os.path.isdir(dataset.ann_file)


def _absent(dataset: object, absent: list[str], total: int) -> Finding:
    folder, suffix = dataset.data_prefix['seg_map_path'], dataset.seg_map_suffix
    message = f'{len(absent)} of {total} pictures have no label map: {first_few(absent)}'
    found = Counter(Path(file).suffix for file in names_below(folder))
    if len(absent) == total and found:
        other, count = found.most_common(1)[0]
        message += (
            f'; {count} of {found.total()} files in {folder} end in {other!r}: set '
            f'seg_map_suffix={other!r} of the dataset'
            if other != suffix
            else '; a label map has to have the name of its picture'
        )
    return Finding.of_files('label-map-absent', message, absent, len(absent) == total)


def _without_picture(dataset: object, files: list[str]) -> list[Finding]:
    folder, suffix = dataset.data_prefix['seg_map_path'], dataset.seg_map_suffix
    if (
        _has_list(dataset)
        or not folder
        or folder == dataset.data_prefix.get('img_path')
        or not files
    ):
        return []  # a list takes what it needs; and pictures may lie beside label maps
    used = {os.path.relpath(file, folder) for file in files}
    spare = sorted(f for f in names_below(folder) if f.endswith(suffix) and f not in used)
    if not spare:
        return []
    message = f'{of(len(spare), "label map")} in {folder} without a picture, such as {spare[0]}'
    files = (os.path.join(folder, file) for file in spare)
    return [Finding.of_files('label-map-without-picture', message, files)]


# ---------------------------------------------------------------- values


@dataclass
class Seen:
    """What label maps hold.

    Attributes:
        values: A row of 256 counts per label map: pixels of each value.
        files: The label maps of these rows.
        sizes: (width, height) of them.
        jpegs: Those that are JPEGs.
        deep: Those with values above 255, which mmseg cuts to 8 bits.
        coloured: Those in colour, which have no row.
        colours: Pixels of each colour, 0xRRGGBB, in them.
        palettes: Whether palettes made them coloured.
        broken: Those that cannot be read.
    """

    values: list[np.ndarray] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    jpegs: list[str] = field(default_factory=list)
    deep: list[str] = field(default_factory=list)
    coloured: list[str] = field(default_factory=list)
    colours: Counter = field(default_factory=Counter)
    palettes: bool = False
    broken: list[str] = field(default_factory=list)


def read_label_maps(files: list[str], palettes: bool, progress: Progress) -> Seen:
    """Reads label maps and counts their values.

    Args:
        files: The label maps.
        palettes: Whether their reader makes colours of palettes.
        progress: Shows the progress of a loop.
    """
    seen = Seen()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders leave Python's lock
        read = pool.map(lambda file: _read(file, palettes), files)
        for file in progress(files, 'label maps'):
            next(read)(seen, file)
    return seen


def _read(file: str, palettes: bool) -> Callable[[Seen, str], None]:
    """Reads one label map; returns what adds it to those seen."""
    try:
        with Image.open(file) as picture:
            kind, mode, size = picture.format, picture.mode, picture.size
            if (mode == 'P' and palettes) or mode in ('LA', 'PA'):
                pixels = np.asarray(picture.convert('RGB'))
            else:
                pixels = np.asarray(picture)
    except Exception:  # decoders raise what they like
        return lambda seen, file: seen.broken.append(file)

    if pixels.ndim == 3:
        red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
        packed, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
        most = np.argsort(-counts)[:256]
        colours = dict(zip(packed[most].tolist(), counts[most].tolist(), strict=True))

        def add(seen: Seen, file: str) -> None:
            seen.coloured.append(file)
            seen.colours.update(colours)
            seen.palettes |= mode == 'P'
    else:
        deep = pixels.dtype != bool and pixels.size > 0 and pixels.max() > 255
        values = np.bincount(pixels.astype(np.uint8).ravel(), minlength=256)

        def add(seen: Seen, file: str) -> None:
            seen.files.append(file)
            seen.values.append(values)
            seen.sizes.append(size)
            if deep:
                seen.deep.append(file)
            if kind == 'JPEG':
                seen.jpegs.append(file)

    return add


def _palettes_are_colours(dataset: object) -> bool:
    """Whether the pipeline's reader of label maps is OpenCV, which makes colours of a palette."""
    readers = _readers(dataset)
    return any(getattr(reader, 'imdecode_backend', None) == 'cv2' for reader in readers)


def _readers(dataset: object) -> list[object]:
    """The transforms of a pipeline that read label maps."""
    places = loading_transforms(getattr(dataset, 'pipeline', []))
    loads = [bare(transforms[place]) for transforms, place in places]
    return [load for load in loads if 'Annotation' in type(load).__name__]


def labels_of_values(dataset: object) -> np.ndarray:
    """(256,): the label that mmseg makes of each value, with label_map and reduce_zero_label."""
    labels = np.arange(256)
    if getattr(dataset, 'reduce_zero_label', False):
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    reduced = labels.copy()
    for old, new in (getattr(dataset, 'label_map', None) or {}).items():
        labels[reduced == old] = new
    return labels


def _judge(dataset: object, census: Census, seen: Seen) -> None:
    """Fills the table of a census and adds what the values tell."""
    read = len(seen.files) + len(seen.coloured) + len(seen.broken)
    if seen.broken:
        message = (
            f'{len(seen.broken)} of {read} label maps cannot be read, such as {seen.broken[0]}'
        )
        census.findings.append(Finding.of_files('label-map-unreadable', message, seen.broken))
    if seen.coloured:
        census.findings.append(_coloured(dataset, seen, read))
    if seen.jpegs:
        census.findings.append(_jpegs(dataset, seen, read))
    if seen.deep:
        message = (
            f'{len(seen.deep)} of {read} label maps have values above 255, of which the loader '
            f'keeps the lowest 8 bits, such as {seen.deep[0]}: write PNGs of 8 bits'
        )
        census.findings.append(Finding.of_files('label-map-16-bit', message, seen.deep))
    if not seen.files:
        return
    values = np.array(seen.values)  # (maps, 256)
    labels, names = labels_of_values(dataset), class_names(dataset)
    # (maps, 256): pixels of each label.
    pixels = np.zeros_like(values)
    np.add.at(pixels.T, labels, values.T)
    ignored = getattr(dataset, 'ignore_index', 255)
    census.table = [
        Row(name, int((pixels[:, i] > 0).sum()), int(pixels[:, i].sum()))
        for i, name in enumerate(names)
    ]
    census.ignored = float(pixels[:, ignored].sum() / max(1, pixels.sum()))
    classes = pixels[:, : len(names)].sum(1) if names else pixels.sum(1) - pixels[:, ignored]
    census.empty = int((classes == 0).sum())
    census.sizes = size_range(seen.sizes)
    if names:
        census.findings += _values(dataset, census, seen, values, labels)
        census.findings += _ignored(dataset, census, seen, values, labels)


def _coloured(dataset: object, seen: Seen, read: int) -> Finding:
    total = sum(seen.colours.values())
    most = seen.colours.most_common(MOST_COLOURS)
    shown = ', '.join(
        f'{name_of(colour, True)} {_percent(count / total)}' for colour, count in most
    )
    if len(seen.colours) > MOST_COLOURS:
        shown += f' and {len(seen.colours) - MOST_COLOURS} more'
    mapping = ' '.join(
        f"'{name_of(colour, True)}:{number}'" for number, (colour, _) in enumerate(most[:2])
    )
    fix = (
        "set imdecode_backend='pillow' of LoadAnnotations, which keeps the indices of palettes"
        if seen.palettes
        else f'make indices of them with {_command(dataset)} --map '
        f'{mapping}{" …" if len(seen.colours) > 2 else ""}, a number of a class for each colour, '
        f'and {_set(dataset)}'
    )
    message = (
        f'{len(seen.coloured)} of {read} label maps are in colour ({shown}), and should have '
        f'one number per pixel, the class: {fix}'
    )
    stops = len(seen.coloured) == read
    return Finding.of_files('colour-label-maps', message, seen.coloured, stops)


def _jpegs(dataset: object, seen: Seen, read: int) -> Finding:
    values = int((np.array(seen.values).sum(0) > 0).sum())
    message = (
        f'{len(seen.jpegs)} of {read} label maps are JPEGs, whose compression blurs labels '
        f'at borders: {values} values were found; make PNGs from the source, or with '
        f'{_command(dataset)} --nearest --map 0:0 …'
    )
    return Finding.of_files('jpeg-label-maps', message, seen.jpegs)


def _values(
    dataset: object, census: Census, seen: Seen, values: np.ndarray, labels: np.ndarray
) -> list[Finding]:
    """Finds values that are no class."""
    count, ignored = len(census.names), getattr(dataset, 'ignore_index', 255)
    is_class, found = labels < count, values.sum(0) > 0
    unknown = np.flatnonzero(found & ~is_class & (labels != ignored))
    findings = []
    maps = values[:, unknown].sum(1) > 0
    if len(unknown):
        shown = ', '.join(map(str, unknown[:5])) + (' …' if len(unknown) > 5 else '')
        message = (
            f'the value{"s" if len(unknown) > 1 else ""} {shown} in {int(maps.sum())} of '
            f'{len(values)} label maps {"are" if len(unknown) > 1 else "is"} no class: '
            f'{_expected(dataset, count, ignored)}; {_remedy(dataset, count, found, ignored)}'
        )
        files = itertools.compress(seen.files, maps)
        findings.append(Finding.of_files('label-values', message, files))
    if not (found & is_class).any():
        what = 'all pixels are ignored' if not len(unknown) else 'no pixel belongs to a class'
        shown = ', '.join(map(str, np.flatnonzero(found)[:5]))
        message = (
            f'{what} (values: {shown}): {_expected(dataset, count, ignored)}; '
            f'{_remedy(dataset, count, found, ignored)}'
        )
        findings.append(Finding.of_files('no-label', message, seen.files, stops=True))
    return findings


def _expected(dataset: object, count: int, ignored: int) -> str:
    if getattr(dataset, 'reduce_zero_label', False):
        return (
            f'with reduce_zero_label=True the {count} classes are 1 to {count}, and 0 and '
            f'{ignored} are ignored'
        )
    return f'the {count} classes are 0 to {count - 1}, and {ignored} is ignored'


def _remedy(dataset: object, count: int, found: np.ndarray, ignored: int) -> str:
    """What to set or type for values that are no class."""
    first = int(bool(getattr(dataset, 'reduce_zero_label', False)))
    values = [int(v) for v in np.flatnonzero(found) if v != ignored]
    if not first and values and max(values) == count and getattr(dataset, 'label_map', 0) is None:
        return 'if 0 is no class, set reduce_zero_label=True of the dataset and of LoadAnnotations'
    command = f'{_command(dataset)} --map'
    if len(values) == count:  # grey levels, such as 0 and 128
        pairs = [(v, i + first) for i, v in enumerate(values) if v != i + first]
        return f'map them with {command} {" ".join(f"{v}:{new}" for v, new in pairs[:5])}'
    return f'map them with {command} VALUE:CLASS …, or name all classes in the metainfo'


def _ignored(
    dataset: object, census: Census, seen: Seen, values: np.ndarray, labels: np.ndarray
) -> list[Finding]:
    """Finds ignored values that look like a class."""
    ignored, found = getattr(dataset, 'ignore_index', 255), values.sum(0) > 0
    never = [i for i, row in enumerate(census.table) if not row.amount]
    shares = values.sum(0) / max(1, values.sum())
    values_ignored = [int(v) for v in np.flatnonzero(found & (labels == ignored))]
    reduced = bool(getattr(dataset, 'reduce_zero_label', False))
    largest = int(np.flatnonzero(found & (labels != ignored)).max(initial=0))
    for value in values_ignored:
        maps = int((values[:, value] > 0).sum())
        if not never or 2 * maps < len(values) or len(never) == len(census.table):
            continue
        name = census.table[never[0]].name
        said = (
            f'class {name!r} never occurs, and {value}, which is ignored, does in {maps} of '
            f'{len(values)} label maps ({_percent(shares[value])} of the pixels)'
        )
        if value == 0 and reduced and largest < len(census.table):
            fix = (
                'set reduce_zero_label=False of the dataset and of LoadAnnotations if 0 is the '
                f'class {census.table[0].name!r}'
            )
        elif value == ignored:
            fix = (
                f'if {value} means {name!r}, map it with {_command(dataset)} --map '
                f'{value}:{never[0] + reduced}, and {_set(dataset)}'
            )
        else:
            continue
        files = itertools.compress(seen.files, values[:, value])
        return [Finding.of_files('ignored-value-like-class', f'{said}: {fix}', files)]
    if census.ignored <= 0.5 or census.ignored == 1:
        return []
    shown = ', '.join(f'{v}: {_percent(shares[v])}' for v in values_ignored)
    fix = (
        'set reduce_zero_label=False of the dataset and of LoadAnnotations'
        if reduced and 0 in values_ignored and shares[0] > 0.5
        else f'map it with {_command(dataset)} --map '
        f'{max(values_ignored, key=lambda v: shares[v])}:CLASS'
    )
    message = (
        f'{_percent(census.ignored)} of the pixels are ignored ({shown}): if that is a class, '
        f'such as the background, {fix}'
    )
    return [Finding.of_files('mostly-ignored', message, seen.files)]


def _command(dataset: object) -> str:
    """The command that makes other label maps of those of a dataset, without its --map."""
    return command(_folder(dataset))


def _set(dataset: object) -> str:
    """What to set to train on what `_command` makes."""
    source = _folder(dataset)
    below = os.path.relpath(source, dataset.data_root) if dataset.data_root else source
    return f'set seg_map_path={below + INDICES!r}'


def _folder(dataset: object) -> str:
    return (dataset.data_prefix.get('seg_map_path') or 'SRC').rstrip('/')


def _percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share > 0.1 else f'{100 * share:.2g} %'
