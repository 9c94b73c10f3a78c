"""Counts what an annotation file of COCO's form has to teach."""

import contextlib
import functools
import gc
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import contains, countOf, itemgetter
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np

from mmslak.datasets.census_table import Census, Progress, Row, size_range
from mmslak.datasets.class_names import check_order, class_names, compare_names
from mmslak.datasets.findings import Finding, counted, examples, of, quoted
from mmslak.datasets.folders import absent_pictures, paths_below
from mmslak.datasets.guard import bare, loading_transforms

REPORTED = 0.01  # share of boxes or pictures left out from which on it is a finding
NUMBERS = b'0123456789+-.eE \t\r\n'  # what is between the commas and brackets of a polygon
SIZES = (32**2, 96**2)  # pixels of an object: COCO's limits of small and large ones


def count_coco(dataset: object, full: bool, progress: Progress) -> Census:
    """Counts the boxes of the classes, and what keeps others from being learnt.

    Args:
        dataset: A CocoDataset of mmdet, which may not be loaded yet.
        full: Of no effect: all annotations are read.
        progress: Shows the progress of a loop.
    """
    with _without_collector():
        return _count_file(dataset, progress)  # which frees the file's content before the end


def _count_file(dataset: object, progress: Progress) -> Census:
    census = Census(unit='objects')
    steps = iter(progress(range(4), f'annotations of {Path(dataset.ann_file).name}'))
    next(steps)
    try:
        content = read_annotations(dataset.ann_file)
        faults = list(_check_form(dataset, content))
    except (OSError, ValueError) as error:
        faults = [_unreadable(dataset, f'is no JSON ({error})')]
    if faults:
        census.findings = faults
        return census
    next(steps)
    boxes = _Boxes(dataset, content)
    census.findings += boxes.check_ids()
    next(steps)
    folder = folder_of(dataset)
    census.files = [os.path.join(folder, image['file_name']) for image in content['images']]
    census.findings += absent_pictures(census.files, folder, str(dataset.ann_file))
    census.findings += _not_listed(census.files, folder, str(dataset.ann_file))
    _count(dataset, census, boxes)
    next(steps)
    census.findings += boxes.check_form()
    if trains_masks(dataset):
        census.findings += _check_polygons(dataset, boxes)
    list(steps)
    return census


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Switches the garbage collector off, which doubles the time of millions of small objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_annotations(path: str) -> object:
    """The content of a JSON file, with `true` in place of polygons that can be used.

    Polygons are most of such a file, and would take most of the time and memory of reading it.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no JSON.
    """
    text = Path(path).read_bytes()
    try:
        content = msgspec.json.decode(text, type=_File)
    except msgspec.MsgspecError:
        return json.loads(text)  # says where it is broken, or takes what is no file of COCO
    for annotation in content.get('annotations', ()):
        if 'segmentation' in annotation:
            annotation['segmentation'] = _outline(bytes(annotation['segmentation']))
    return content


class _Annotation(TypedDict, total=False):
    """What is read of an annotation; its polygons stay text."""

    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any
    ignore: Any
    segmentation: msgspec.Raw


class _File(TypedDict, total=False):
    images: list[dict]
    annotations: list[_Annotation]
    categories: list[dict]


def _outline(text: bytes) -> object:
    """`True` for a list of polygons that can be used, else what the text says."""
    return _can_be_used(text.translate(None, NUMBERS)) or msgspec.json.decode(text)


@functools.lru_cache(maxsize=100_000)  # most objects have one polygon, of some dozens of points
def _can_be_used(frame: bytes) -> bool:
    """Whether polygons, of which commas and brackets are left, have 3 or more whole points."""
    polygons = frame[1:].split(b']')[:-2] if frame.startswith(b'[[') else []
    # Commas between numbers; before all but the first polygon there is one more.
    counts = [polygon.count(b',') + (i == 0) for i, polygon in enumerate(polygons)]
    return bool(counts) and all(count >= 6 and count % 2 == 0 for count in counts)


def _unreadable(dataset: object, what: str, count: int = 0) -> Finding:
    file = str(dataset.ann_file)
    return Finding('annotations-unreadable', f'{file} {what}', '', True, (file,), count)


def _check_form(dataset: object, content: object) -> Iterable[Finding]:
    """Finds what CocoDataset cannot read."""
    is_dict = isinstance(content, dict)
    lacking = [n for n in ('images', 'categories') if not is_dict or not content.get(n)]
    if lacking:
        lists = "the lists 'images', 'annotations' and 'categories'"
        yield _unreadable(dataset, f'has no {quoted(lacking)}: a file of COCO has {lists}')
        return
    content.setdefault('annotations', [])  # pictures of a test may have none
    keys = dict(
        images=('id', 'file_name', 'width', 'height'),
        annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
        categories=('id', 'name'),
    )
    for name, wanted in keys.items():
        for key in wanted:
            count = countOf(map(contains, content[name], repeat(key)), False)
            if count:
                hint = ': write width × height of the box' if key == 'area' else ''
                yield _unreadable(dataset, f'has {of(count, "entry")} of {name!r} without '
                                  f'{key!r}{hint}', count)  # fmt: skip
    wrong = sum('bbox' in a and len(a['bbox'] or ()) != 4 for a in content['annotations'])
    if wrong:
        yield _unreadable(dataset, f'has {of(wrong, "bbox")} without 4 numbers', wrong)


def trains_masks(dataset: object) -> bool:
    """Whether the pipeline of a data set loads masks of instances."""
    places = loading_transforms(getattr(dataset, 'pipeline', []))
    return any(getattr(bare(list_[i]), 'with_mask', False) for list_, i in places)


class _Boxes:
    """The annotations of a file as arrays, one entry per annotation.

    Attributes:
        box: (N, 4) of x, y, width, height.
        image: (N,): number of the picture; -1 for none.
        label: (N,): number of the class; -1 where the data set does not look for it.
        per_category: How many annotations have each category_id.
    """

    def __init__(self, dataset: object, content: dict) -> None:
        self.dataset, self.annotations = dataset, content['annotations']
        self.images, self.categories = content['images'], content['categories']
        names = class_names(dataset) or [str(c['name']) for c in self.categories]
        self.classes = names
        self.names = {c['id']: str(c['name']) for c in self.categories}
        self.image_of = {image['id']: i for i, image in enumerate(self.images)}
        label_of = {i: names.index(n) for i, n in self.names.items() if n in names}
        total = len(self.annotations)

        # Loops in C, since there are millions of values.
        def of_all(key: str) -> Iterable:
            return map(itemgetter(key), self.annotations)

        def numbers(values: Iterable, dtype: type = np.int64) -> np.ndarray:
            return np.fromiter(values, dtype, total)

        self.per_category = Counter(of_all('category_id'))
        self.image = numbers(map(self.image_of.get, of_all('image_id'), repeat(-1)))
        self.label = numbers(map(label_of.get, of_all('category_id'), repeat(-1)))
        self.area = numbers(of_all('area'), float)
        self.is_crowd = numbers((a.get('iscrowd') for a in self.annotations), bool)
        self.is_ignored = numbers((a.get('ignore') for a in self.annotations), bool)
        self.box = np.fromiter(chain.from_iterable(of_all('bbox')), float, 4 * total).reshape(-1, 4)
        self.size = np.array([(i['width'], i['height']) for i in self.images], float)
        self.beyond = self.box[:, :2] + self.box[:, 2:] > self.size[self.image] + 1

    def check_ids(self) -> Iterable[Finding]:
        """Finds numbers that are there twice, or belong to nothing."""
        file = str(self.dataset.ann_file)
        double = len(self.images) - len(self.image_of)
        if double:
            yield Finding(
                'duplicate-ids',
                f'{of(double, "id")} of pictures in {file} is there more than once: the last '
                'picture of an id replaces the others; give each one its own',
                files=(file,),
                count=double,
            )
        double = len(self.annotations) - len(set(map(itemgetter('id'), self.annotations)))
        if double:
            unique = getattr(self.dataset, 'ANN_ID_UNIQUE', True)
            yield Finding(
                'duplicate-ids',
                f'{of(double, "id")} of annotations in {file} is there more than once: '
                f'{type(self.dataset).__name__} wants each annotation to have its own',
                stops=bool(unique),
                files=(file,),
                count=double,
            )
        lost = Counter({c: n for c, n in self.per_category.items() if c not in self.names})
        if lost:
            yield Finding(
                'category-unknown',
                f'{of(lost.total(), "annotation")} of {file} have a category_id '
                f'({", ".join(map(str, list(lost)[:5]))}) that no category has: they are left '
                f'out; the categories are {", ".join(map(str, list(self.names)[:5]))}',
                files=(file,),
                count=lost.total(),
            )
        count = int((self.image < 0).sum())
        if count:
            yield Finding(
                'image-unknown',
                f'{of(count, "annotation")} of {file} have an image_id that no picture has: they '
                'are left out',
                files=(file,),
                count=count,
            )

    def check_form(self) -> Iterable[Finding]:
        """Finds boxes of another form than x, y, width, height in pixels."""
        file, (x, y, w, h) = str(self.dataset.ann_file), self.box.T
        width, height = self.size[self.image].T
        total = len(self.box)
        if not total:
            return
        corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        wrong = self.beyond.any(1)
        if 2 * wrong.sum() > total and corners.mean() > 0.95:
            i = int(np.flatnonzero(wrong)[0])
            yield Finding(
                'boxes-as-corners',
                f'{int(wrong.sum())} of {total} boxes in {file} reach outside of their '
                'picture as x, y, width, height, and fit as x1, y1, x2, y2: bbox is '
                f'[x, y, width, height], for the first one {_as_size(self.box[i])}',
                files=self._files(wrong),
                count=int(wrong.sum()),
            )
        if self.box.max() <= 1 and width.min() > 1:
            yield Finding(
                'boxes-as-shares',
                f'all {of(total, "box")} in {file} lie between 0 and 1: bbox is in pixels, so '
                'multiply it by the width and height of the picture',
                files=self._files(np.ones(total, bool)),
                count=total,
            )

    def _files(self, chosen: np.ndarray) -> tuple[str, ...]:
        return self.files_of(np.unique(self.image[chosen & (self.image >= 0)]))

    def files_of(self, images: Iterable[int]) -> tuple[str, ...]:
        """Paths of pictures, of which the first ones are given."""
        folder = folder_of(self.dataset)
        return examples(os.path.join(folder, self.images[i]['file_name']) for i in images)


def _as_size(box: np.ndarray) -> str:
    x1, y1, x2, y2 = box
    return f'[{x1:g}, {y1:g}, {x2 - x1:g}, {y2 - y1:g}]'


def folder_of(dataset: object) -> str:
    """Where the pictures of a data set of mmdet are."""
    return (getattr(dataset, 'data_prefix', None) or {}).get('img') or ''


def _count(dataset: object, census: Census, boxes: _Boxes) -> None:
    """Fills the table of a census with the boxes that training takes."""
    classes, total = boxes.classes, len(boxes.images)
    settings = {} if getattr(dataset, 'test_mode', False) else dataset.filter_cfg or {}
    x, y, w, h = boxes.box.T
    width, height = boxes.size[boxes.image].T
    outside = (np.minimum(x + w, width) <= np.maximum(x, 0)) | (
        np.minimum(y + h, height) <= np.maximum(y, 0)
    )
    # In the order in which CocoDataset leaves them out.
    reasons = {
        'of no picture': boxes.image < 0,
        'marked as ignored': boxes.is_ignored,
        'outside of the picture': outside,
        'with an area of 0': boxes.area <= 0,
        'below one pixel': (w < 1) | (h < 1),
        'of classes that are not looked for': boxes.label < 0,
        'of crowds': boxes.is_crowd,
    }
    kept = np.ones(len(boxes.box), bool)
    for reason, leaves_out in reasons.items():
        if (kept & leaves_out).any():
            census.dropped[f'boxes {reason}'] = int((kept & leaves_out).sum())
        kept &= ~leaves_out

    has_class = np.zeros(total, bool)
    has_class[boxes.image[(boxes.label >= 0) & (boxes.image >= 0)]] = True
    stays = np.ones(total, bool)
    if settings.get('filter_empty_gt'):
        stays &= has_class
        census.dropped['pictures without annotation (filter_empty_gt)'] = int((~stays).sum())
    small = stays & (boxes.size.min(1) < settings.get('min_size', 0))
    census.dropped[f'pictures below {settings.get("min_size")} pixels (min_size)'] = small.sum()
    stays &= ~small
    lost = kept & ~stays[boxes.image]
    kept &= ~lost
    census.dropped = {reason: int(n) for reason, n in census.dropped.items() if n}

    census.pictures, census.names = total, list(boxes.names.values())
    has_box = np.zeros(total, bool)
    has_box[boxes.image[kept]] = True
    census.empty = int((~has_box).sum())
    amounts = np.bincount(boxes.label[kept], minlength=len(classes))
    pairs = np.unique(boxes.image[kept] * len(classes) + boxes.label[kept])
    pictures = np.bincount(pairs % max(1, len(classes)), minlength=len(classes))
    census.table = [
        Row(name, int(n), int(m)) for name, n, m in zip(classes, pictures, amounts, strict=True)
    ]
    limits = np.searchsorted(SIZES, boxes.area[kept], 'right')
    small, medium, large = (int((limits == i).sum()) for i in range(3))
    census.sizes = size_range({tuple(map(int, size)) for size in boxes.size})
    census.sizes |= dict(small=small, medium=medium, large=large)

    file = str(dataset.ann_file)
    used = Counter(dict.fromkeys(boxes.names.values(), 0))
    for category, count in boxes.per_category.items():
        if category in boxes.names:
            used[boxes.names[category]] += count
    unknown = compare_names(dataset, used, file, 'category')
    census.findings += unknown
    census.findings += check_order(dataset, [c['name'] for c in boxes.categories], file)
    if not any(finding.stops for finding in unknown):
        census.findings += left_out(census, file, len(boxes.box), int(kept.sum()))


def left_out(census: Census, source: str, boxes: int, left: int) -> list[Finding]:
    """Says what filters take, if it is everything or much.

    Args:
        census: The census, with `dropped`.
        source: The annotations, for the message.
        boxes: Number of boxes in the annotations.
        left: Number of those that training takes.
    """
    counts = {
        reason: count
        for reason, count in census.dropped.items()
        if left == 0 or not reason.endswith(('crowds', 'looked for', 'filter_empty_gt)'))
    }
    if left == 0:
        message = f'no annotation of {source} is left of {boxes} boxes: {counted(counts) or "none"}'
        return [Finding('no-annotation', message, '', True, (source,), boxes)]
    of_boxes = sum(n for reason, n in counts.items() if reason.startswith('boxes'))
    of_small = sum(n for reason, n in counts.items() if reason.startswith('pictures below'))
    if of_boxes < REPORTED * boxes and of_small < REPORTED * census.pictures:
        return []
    return [
        Finding(
            'annotations-left-out',
            f'of {boxes} boxes in {source} {left} are left; left out: {counted(counts)}',
            files=(source,),
            count=boxes - left,
        )
    ]


def _not_listed(paths: list[str], folder: str, file: str) -> Iterable[Finding]:
    """Finds pictures that lie beside those of a file, and are not in it."""
    listed = set(map(os.path.normpath, paths))
    folders = {os.path.dirname(path) for path in listed}
    endings = {os.path.splitext(path)[1].lower() for path in listed}
    spare = sorted(
        path
        for path in map(os.path.normpath, paths_below(folder or '.'))
        if path not in listed
        and os.path.dirname(path) in folders
        and os.path.splitext(path)[1].lower() in endings
    )
    if spare:
        message = (
            f'{of(len(spare), "picture")} of {folder or "."} are not in {file}, such as '
            f'{os.path.relpath(spare[0], folder or ".")}'
        )
        yield Finding.of_files('pictures-not-listed', message, spare)


def no_masks(dataset: object, source: str, count: int, total: int) -> Finding:
    """The finding of annotations without polygons, where the pipeline loads masks."""
    return Finding(
        'no-polygons',
        f"{count} of {total} annotations in {source} have no 'segmentation', of which masks "
        'are made: this config trains masks (with_mask=True); give polygons, or use a config of '
        'boxes alone, such as mmslak::faster_rcnn_slak_t_voc07.py with this dataset',
        stops=count == total,
        files=(source,),
        count=count,
    )


def _check_polygons(dataset: object, boxes: _Boxes) -> Iterable[Finding]:
    file = str(dataset.ann_file)
    outlines = [a.get('segmentation') for a in boxes.annotations]
    lacking = sum(not outline for outline in outlines)
    if lacking:
        yield no_masks(dataset, file, lacking, len(outlines))
    short = np.fromiter((o is not True and _is_short(o) for o in outlines), bool, len(outlines))
    if short.any():
        yield Finding(
            'short-polygons',
            f'{of(int(short.sum()), "annotation")} of {file} with fewer than 3 points in a '
            'polygon, or half a point, or without the outer list: left out or not to be read; a '
            'segmentation is a list of polygons, [[x1, y1, x2, y2, x3, y3, …], …]',
            files=boxes.files_of(np.unique(boxes.image[short & (boxes.image >= 0)])),
            count=int(short.sum()),
        )


def _is_short(outline: object) -> bool:
    """Whether there are polygons of no use; `read_annotations` puts `true` in place of others."""
    polygons = outline if isinstance(outline, list) else []
    return any(not isinstance(p, list) or len(p) < 6 or len(p) % 2 for p in polygons)
