"""Counts what a data set has to teach, from its annotations alone."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from mmslak.datasets.census_coco import count_coco
from mmslak.datasets.census_folders import count_folders
from mmslak.datasets.census_label_maps import count_label_maps
from mmslak.datasets.census_table import Census, Progress, Row
from mmslak.datasets.census_voc import count_voc
from mmslak.datasets.class_names import classes_as_text
from mmslak.datasets.findings import Finding, of, quoted
from mmslak.datasets.folders import read_once
from mmslak.datasets.guard import innermost

__all__ = ['Census', 'Row', 'count', 'joined', 'take_census']

# What counts data sets, by the class that lists their samples.
COUNTERS = {
    'BaseSegDataset': count_label_maps,
    'CocoDataset': count_coco,
    'XMLDataset': count_voc,
    'CustomDataset': count_folders,
    'ImageNet': count_folders,
}
# What stops a run in validation, too: the data set cannot be loaded.
UNREADABLE = (
    *('no-picture', 'classes-as-text', 'class-folders', 'annotations-unreadable'),
    *('annotations-absent', 'duplicate-ids'),
)
# Share of the classes that a sample may lack without a warning.
RARE = 0.1


@read_once()
def take_census(dataset: object, *, loader: str = '', full: bool = False) -> Census:
    """Counts what a data set has to teach.

    Args:
        dataset: A dataset of mmseg, mmdet or mmpretrain, also one inside of wrappers, and also one
            that is not loaded (`lazy_init=True`), as where loading it fails.
        loader: Part of the config that it belongs to.
        full: Whether to read all label maps; a sample of them otherwise.

    Returns:
        Its census. One without a unit if the data set is of a form that is not known here.
    """
    return joined((count(part, full) for part in innermost(dataset)), loader)


def count(dataset: object, full: bool, progress: Progress = lambda items, _: items) -> Census:
    """Counts what one data set, not inside of a wrapper, has to teach."""
    lists = next((c for c in type(dataset).__mro__ if 'load_data_list' in vars(c)), object)
    counter = COUNTERS.get(lists.__name__)
    if counter is None or not _is_local(dataset):
        return Census()
    classes = (dataset.metainfo or {}).get('classes')
    if isinstance(classes, str):
        message = classes_as_text(type(dataset).__name__, classes)
        return Census(findings=[Finding('classes-as-text', message, stops=True)])
    return counter(dataset, full, progress)


def _is_local(dataset: object) -> bool:
    """Whether the files of a data set are in the file system of this machine."""
    storage = getattr(dataset, 'backend_args', None) or {}
    prefixes = getattr(dataset, 'data_prefix', None) or {}
    places = [*(prefixes.values() if isinstance(prefixes, dict) else [prefixes]), dataset.ann_file]
    remote = any('://' in str(place) for place in places)
    return storage.get('backend', 'local') in ('local', 'disk') and not remote


def joined(parts: Iterable[Census], loader: str = '') -> Census:
    """The census of data sets from which a loader draws together."""
    parts = list(parts)
    # What one of them lacks, such as the pictures without labels of semi-supervised training,
    # stops nothing if another one has it.
    needed = loader in ('', 'train_dataloader') and not any(map(_teaches, parts))
    findings = [
        replace(f, loader=loader, stops=f.stops and (needed or f.kind in UNREADABLE))
        for part in parts
        for f in part.findings
    ]
    unit = next((part.unit for part in parts if part.unit), '')
    parts = [part for part in parts if part.unit == unit]
    whole = replace(parts[0] if parts else Census(), loader=loader, findings=findings)
    if len(parts) > 1:
        _add_up(whole, parts)
    # All classes are missing where the labels cannot be read: that was said.
    if whole.pictures and not any(f.stops for part in parts for f in part.findings):
        whole.findings = findings + [replace(f, loader=loader) for f in _never(whole)]
    return whole


def _teaches(census: Census) -> bool:
    return any(row.amount for row in census.table) and not any(f.stops for f in census.findings)


def _add_up(whole: Census, parts: list[Census]) -> None:
    rows, dropped = {}, Counter()
    for part in parts:
        dropped.update(part.dropped)
        for row in part.table:
            old = rows.get(row.name, Row(row.name, 0, 0))
            rows[row.name] = Row(row.name, old.pictures + row.pictures, old.amount + row.amount)
    whole.table, whole.dropped = list(rows.values()), dict(dropped)
    whole.pictures = sum(part.pictures for part in parts)
    whole.files = [file for part in parts for file in part.files]
    whole.empty = sum(part.empty for part in parts)
    if any(part.sampled for part in parts):
        read = [part.sampled or (part.pictures, part.pictures) for part in parts]
        whole.sampled = tuple(map(sum, zip(*read, strict=True)))
    if whole.ignored is not None:
        whole.ignored = sum(p.ignored * p.pictures for p in parts) / max(1, whole.pictures)
    sizes = [part.sizes for part in parts if part.sizes]
    whole.sizes = {}
    for key in sizes[0] if sizes else ():
        values, by_area = [s[key] for s in sizes if key in s], dict(smallest=min, largest=max)
        whole.sizes[key] = by_area[key](values, key=math.prod) if key in by_area else sum(values)


def _never(census: Census) -> list[Finding]:
    """Finds classes that do not occur."""
    never = [row.name for row in census.table if not row.amount]
    said = ' '.join(finding.message for finding in census.findings)
    never = [name for name in never if f'class {name!r} never occurs' not in said]
    if not never or (census.sampled and len(never) <= RARE * len(census.table)):
        return []  # a sample may lack rare classes by right
    noun = f'class {never[0]!r} never occurs'
    if len(never) > 1:
        noun = f'{len(never)} of {len(census.table)} classes never occur ({quoted(never)})'
    where = of(census.pictures, 'picture')
    if census.sampled:
        where = '{} label maps that were read of {}'.format(*census.sampled)
    it = 'it' if len(never) == 1 else 'them'
    if census.loader in ('', 'train_dataloader'):
        effect = f'nothing is learnt of {it}; label some, or take {it} out of the classes'
    else:
        effect = f'not measured here; to measure {it}, add pictures that have {it}'
    message = f'{noun} in {where}: {effect}'
    return [Finding('class-never-occurs', message, count=len(never))]
