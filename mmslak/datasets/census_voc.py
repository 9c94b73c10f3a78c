"""Counts what annotations of PASCAL VOC's form have to teach: an XML file per picture."""

import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from mmslak.datasets.census_coco import left_out, no_masks, trains_masks
from mmslak.datasets.census_table import Census, Progress, Row, size_range
from mmslak.datasets.class_names import class_names, compare_names
from mmslak.datasets.findings import Finding, of
from mmslak.datasets.folders import absent_pictures
from mmslak.errors import first_few


def count_voc(dataset: object, full: bool, progress: Progress) -> Census:
    """Counts the objects of the classes, and what keeps others from being learnt.

    Args:
        dataset: An XMLDataset of mmdet, which may not be loaded yet.
        full: Of no effect: all annotations are read.
        progress: Shows the progress of a loop.
    """
    census, names = Census(unit='objects'), Path(dataset.ann_file).read_text().split('\n')
    names = [name.strip() for name in names if name.strip()]
    if not names:
        message, files = f'{dataset.ann_file} lists no picture', (str(dataset.ann_file),)
        census.findings = [Finding('no-picture', message, stops=True, files=files)]
        return census
    folder = os.path.join(dataset.sub_data_root, dataset.ann_subdir)
    census.pictures = len(names)
    pictures_in = os.path.join(dataset.sub_data_root, dataset.img_subdir)
    suffix = getattr(dataset, 'img_suffix', '.jpg')
    census.files = [os.path.join(pictures_in, f'{name}{suffix}') for name in names]
    looks_for = f'mmdet looks for {suffix!r}'
    census.findings += absent_pictures(census.files, pictures_in, str(dataset.ann_file), looks_for)

    classes, found, broken, absent = class_names(dataset), Counter(), [], []
    objects, pictures, dropped, sizes = Counter(), Counter(), Counter(), set()
    training, total = not getattr(dataset, 'test_mode', False), 0
    settings = (dataset.filter_cfg or {}) if training else {}
    for name in progress(names, f'annotations of {Path(dataset.ann_file).name}'):
        file = os.path.join(folder, f'{name}.xml')
        try:
            size, boxes = _read(file, classes)
        except FileNotFoundError:
            absent.append(file)
            continue
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError, OSError) as error:
            broken.append((file, error))
            continue
        if size:
            sizes.add(size)
        total += len(boxes)
        found.update(label for label, *_ in boxes)
        known = [box for box in boxes if box[0] in classes]
        dropped['boxes of classes that are not looked for'] += len(boxes) - len(known)
        if not known and settings.get('filter_empty_gt'):
            dropped['pictures without annotation (filter_empty_gt)'] += 1
        if size and min(size) < settings.get('min_size', 0):
            dropped[f'pictures below {settings["min_size"]} pixels (min_size)'] += 1
            dropped['boxes of small pictures'] += len(known)
            known = []
        limit, kept = settings.get('bbox_min_size') or 0, set()
        for label, difficult, sides in known:
            if difficult:
                dropped['boxes marked as difficult'] += 1
            elif min(sides) < limit:
                dropped[f'boxes below {limit} pixels (bbox_min_size={limit})'] += 1
            else:
                objects[label] += 1
                kept.add(label)
        pictures.update(kept)
        census.empty += not kept
    census.dropped = {reason: count for reason, count in dropped.items() if count}
    census.names = sorted(found)
    census.table = [Row(name, pictures[name], objects[name]) for name in classes]
    if sizes:
        census.sizes = size_range(sizes)

    if absent:
        message = (
            f'{len(absent)} of {len(names)} pictures that {dataset.ann_file} lists have no XML '
            f'file in {folder}: {first_few(Path(file).name for file in absent)}'
        )
        census.findings.append(Finding.of_files('annotations-absent', message, absent, stops=True))
    if broken:
        file, error = broken[0]
        message = (
            f'{of(len(broken), "XML file")} in {folder} cannot be read, such as '
            f'{Path(file).name} ({type(error).__name__}: {error})'
        )
        files = (file for file, _ in broken)
        census.findings.append(Finding.of_files('annotations-unreadable', message, files, True))
    if total or not absent:
        unknown = compare_names(dataset, dict(sorted(found.items())), folder, 'class')
        census.findings += unknown
        if not any(finding.stops for finding in unknown):
            census.findings += left_out(census, folder, total, objects.total())
    if total and trains_masks(dataset):
        census.findings.append(no_masks(dataset, folder, total, total))
    return census


def _read(file: str, classes: list[str]) -> tuple[tuple[int, int] | None, list[tuple]]:
    """(width, height) of a picture, and (class, whether it is difficult, sides) of its objects.

    Those of other classes have nothing but their class: mmdet does not read more of them, either.
    """
    root, boxes = ElementTree.parse(file).getroot(), []
    size = root.find('size')
    size = size if size is None else tuple(int(size.find(n).text) for n in ('width', 'height'))
    for node in root.findall('object'):
        if node.find('name').text not in classes:
            boxes.append((node.find('name').text,))
            continue
        box = node.find('bndbox')
        # As mmdet does: numbers are cut to integers.
        sides = {n: int(float(box.find(n).text)) for n in ('xmin', 'ymin', 'xmax', 'ymax')}
        difficult = node.find('difficult')
        boxes.append((
            node.find('name').text,
            difficult is not None and bool(int(difficult.text)),
            (sides['xmax'] - sides['xmin'], sides['ymax'] - sides['ymin']),
        ))  # fmt: skip
    return size, boxes
