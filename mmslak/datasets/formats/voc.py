"""PASCAL VOC's format: an XML file of boxes for each picture."""

from collections import defaultdict
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from mmslak.datasets.findings import of
from mmslak.datasets.formats.description import SPLITS, DataSet, Sample
from mmslak.datasets.formats.files import is_picture, picture_size, read_text, split_of
from mmslak.datasets.formats.objects import annotation
from mmslak.errors import UserError, first_few

LISTS = 'ImageSets/Main'
CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


def recognise(root: Path, files: list[str]) -> DataSet | None:
    """Recognises XML files of boxes, wherever they and their pictures are.

    A devkit with lists of its splits and .jpg pictures is read as it is.

    Raises:
        UserError: If a file cannot be read, or two devkits are in the folder.
    """
    things, notes = {}, []
    for file in files:
        if file.lower().endswith('.xml'):
            found = _parse(root / file)
            if found is not None:
                things[file] = found
    if not things:
        return None
    kits = sorted({str(PurePosixPath(f).parents[2]) for f in files if f'{LISTS}/' in f})
    if len(kits) > 1:
        raise UserError(f'{len(kits)} devkits are in {root}: give one, as in {root / kits[0]}')

    pictures = _pictures(files)
    names = sorted({name for _, objects in things.values() for name, *_ in objects})
    samples, without = {}, []
    for file, (size, objects) in things.items():
        path = _picture_of(file, pictures)
        if path is None:
            without.append(file)
            continue
        width, height = size if all(size) else picture_size(root / path)
        found = [
            annotation(names.index(n), (x - 1, y - 1, right - x, bottom - y), crowd=difficult)
            for n, (x, y, right, bottom), difficult in objects
        ]
        numbers = frozenset(one['category_id'] for one in found)
        samples[file] = Sample(path, numbers, found, (width, height))
    if not samples:
        raise UserError(f'no picture beside {root / without[0]} or in JPEGImages')
    if without:
        notes.append(f'{of(len(without), "XML file")} without picture: {first_few(without)}')
    bare = len({p for paths in pictures.values() for p in paths}) - len(samples)
    if bare > 0:
        notes.append(f'left out: {of(bare, "picture")} without XML file')

    sign = f'{of(len(things), "XML file")} of boxes, such as {next(iter(things))}'
    data = DataSet(root, 'voc', 'boxes', sign, tuple(names), notes=notes)
    listed = _listed(root, kits[0], samples) if kits else {}
    if 'train' not in listed:
        for file, sample in samples.items():
            folders = (p.name for p in PurePosixPath(file).parents)
            data.splits.setdefault(split_of(*folders) or '', []).append(sample)
        return data
    data.splits = listed
    whole = all(size and all(size) for size, _ in things.values())
    regular = f'{kits[0]}/JPEGImages/'.removeprefix('./')
    if whole and all(s.path == f'{regular}{PurePosixPath(s.path).stem}.jpg' for s in _all(listed)):
        data.direct = {
            split: dict(
                type='VOCDataset',
                ann_file=f'{kits[0]}/{LISTS}/{name}.txt'.removeprefix('./'),
                data_prefix=dict(sub_data_root=f'{kits[0]}/'),
            )
            for split, name in _lists(root / kits[0] / LISTS).items()
            if split in listed
        }
    return data


def _all(splits: dict[str, list[Sample]]) -> list[Sample]:
    return [sample for samples in splits.values() for sample in samples]


def _parse(path: Path) -> tuple[tuple[int, int], list[tuple]] | None:
    """((width, height), [(class, corners, whether it is difficult)]); None of other XML files."""
    try:
        tree = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f'{path} cannot be read as XML: {error}') from error
    if tree.tag != 'annotation':
        return None
    try:
        size = tuple(int(float(tree.findtext(f'size/{side}') or 0)) for side in ('width', 'height'))
        objects = [
            (
                thing.findtext('name').strip(),
                tuple(float(thing.findtext(f'bndbox/{corner}')) for corner in CORNERS),
                (thing.findtext('difficult') or '0').strip() == '1',
            )
            for thing in tree.findall('object')
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f'{path}: an object without name or without bndbox of {", ".join(CORNERS)} ({error})'
        ) from error
    return size, objects


def _pictures(files: list[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for file in filter(is_picture, files):
        if 'Segmentation' not in file:  # the devkit's label maps
            found[PurePosixPath(file).stem].append(file)
    return found


def _picture_of(file: str, pictures: dict[str, list[str]]) -> str | None:
    """The picture with the name of an XML file, the nearest to it."""
    own = PurePosixPath(file).parts

    def common(path: str) -> int:
        parts = PurePosixPath(path).parts
        return next((i for i, (a, b) in enumerate(zip(parts, own)) if a != b), len(own))

    return max(pictures.get(PurePosixPath(file).stem, ()), key=common, default=None)


def _lists(folder: Path) -> dict[str, str]:
    """Which list of a devkit is for which split."""
    there = {file.stem for file in folder.glob('*.txt')}
    if {'train', 'val'} <= there:
        return {split: split for split in SPLITS if split in there}
    names = dict(train='trainval' if 'trainval' in there else 'train')
    names['val'] = 'val' if 'val' in there else 'test'
    return {split: name for split, name in names.items() if name in there}


def _listed(root: Path, kit: str, samples: dict[str, Sample]) -> dict[str, list[Sample]]:
    """The samples of a devkit's lists; of those alone that are whole, since a test set may not be.

    Raises:
        UserError: If the list to train on names what is not there.
    """
    by_name = {PurePosixPath(file).stem: sample for file, sample in samples.items()}
    splits = {}
    for split, name in _lists(root / kit / LISTS).items():
        path = root / kit / LISTS / f'{name}.txt'
        members = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        missing = [member for member in members if member not in by_name]
        if missing and split == 'train':
            raise UserError(
                f'{path}: {len(missing)} of {len(members)} names have no picture with XML file: '
                f'{first_few(missing)}'
            )
        if members and not missing:
            splits[split] = [by_name[member] for member in members]
    return splits if 'val' in splits else {'train': splits['train']} if 'train' in splits else {}
