"""YOLO's format: a text file of boxes or polygons for each picture, and a YAML file of names."""

from pathlib import Path, PurePosixPath

import yaml

from mmslak.datasets.findings import of
from mmslak.datasets.formats.description import SPLITS, DataSet, Sample
from mmslak.datasets.formats.files import is_picture, picture_size, read_text, split_of
from mmslak.datasets.formats.objects import annotation, kind_of
from mmslak.errors import UserError, first_few

NAMES = ('classes.txt', 'obj.names', 'labels.txt')  # of sets without YAML


def recognise(root: Path, files: list[str]) -> DataSet | None:
    """Recognises text files beside pictures, or in `labels` beside `images`, and their names.

    Raises:
        UserError: If the YAML file or a text file cannot be read, or a class has no name.
    """
    there = set(files)
    labels = {p: label for p in files if is_picture(p) and (label := _label_of(p, there))}
    file, content = _read_yaml(root, files)
    if not labels:
        return None
    if content is not None:
        sign, classes = f'names in {file}', _names(root / file, content['names'])
    else:
        sign = next((name for name in files if PurePosixPath(name).name in NAMES), None)
        if sign is None:
            return None  # text files are of many formats
        classes = tuple(line for line in read_text(root / sign).splitlines() if line.strip())
        sign = f'names in {sign}'
    sign += f' and text files of boxes, such as {next(iter(labels.values()))}'
    data = DataSet(root, 'yolo', 'boxes', sign, classes)

    pose = content is not None and 'kpt_shape' in content
    bare, wrong = 0, []
    groups = _groups(root, file, content or {}, files, data.notes)
    for split, pictures in groups.items():
        data.splits[split] = []
        for path in pictures:
            label = labels.get(path)
            size = picture_size(root / path)
            lines = read_text(root / label).splitlines() if label else []
            objects = []
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                found = _annotation(line, size, pose)
                if found is None:
                    wrong.append(f'{label}:{number} ({line!r})')
                elif not 0 <= found['category_id'] < len(classes):
                    raise UserError(
                        f'{root / label}:{number} is of class {found["category_id"]}, but '
                        f'{len(classes)} classes have names, from 0: {first_few(classes, 10)}'
                    )
                else:
                    objects.append(found)
            bare += label is None
            numbers = frozenset(thing['category_id'] for thing in objects)
            data.splits[split].append(Sample(path, numbers, objects, size))
    data.splits = {split: samples for split, samples in data.splits.items() if samples}
    if bare:
        data.notes.append(f'{of(bare, "picture")} without text file: nothing is on them')
    if wrong:
        data.notes.append(f'left out: {of(len(wrong), "line")} of no object: {wrong[0]}')
    everything = [sample for samples in data.splits.values() for sample in samples]
    if not any(sample.label for sample in everything):
        shown = f'; {wrong[0]} is none' if wrong else ''
        raise UserError(
            f'no object in the {len(labels)} text files of {root}{shown}; expected CLASS X Y WIDTH '
            'HEIGHT in each line, or CLASS X1 Y1 X2 Y2 … of a polygon, as shares of the picture '
            'from 0 to 1'
        )
    data.kind = kind_of(everything, data.notes)
    return data


def _label_of(picture: str, files: set[str]) -> str | None:
    """The text file of a picture: in `labels` instead of the last `images`, or beside it."""
    path = PurePosixPath(picture).with_suffix('.txt')
    folders = list(path.parts)
    for place in range(len(folders) - 2, -1, -1):
        if folders[place].lower() == 'images':
            other = '/'.join([*folders[:place], 'labels', *folders[place + 1 :]])
            if other in files:
                return other
            break
    return str(path) if str(path) in files else None


def _read_yaml(root: Path, files: list[str]) -> tuple[str, dict | None]:
    """(file, content) of the YAML file with names; ('', None) if there is none."""
    found = {}
    for file in files:
        if PurePosixPath(file).suffix.lower() in ('.yaml', '.yml'):
            try:
                content = yaml.safe_load(read_text(root / file))
            except yaml.YAMLError as error:
                raise UserError(f'{root / file} cannot be read as YAML: {error}') from error
            if isinstance(content, dict) and 'names' in content:
                found[file] = content
    if len(found) > 1:
        raise UserError(
            f'{len(found)} YAML files of {root} have names: {first_few(found)}; give the one to '
            'use: mmslak new-config FILE'
        )
    return next(iter(found.items()), ('', None))


def _names(path: Path, names: object) -> tuple[str, ...]:
    """Names by number, from a list or from a dict of numbers.

    Raises:
        UserError: If it is neither.
    """
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f'{path}: names has the numbers {first_few(names)}; expected 0, 1, 2 …')
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f'{path}: names is {names!r}; expected a list of names')
    return tuple(str(name) for name in names)


def _groups(
    root: Path, file: str, content: dict, files: list[str], notes: list[str]
) -> dict[str, list[str]]:
    """Pictures of each split: as the YAML says, else as the names of folders say."""
    pictures = [name for name in files if is_picture(name)]
    groups = {}
    for split in SPLITS:
        given = content.get(split, content.get('valid') if split == 'val' else None)
        places = given if isinstance(given, list) else [given] if given else []
        members = set()
        for place in map(str, places):
            found = _below(root, file, content.get('path'), place, pictures)
            members |= set(found)
            if not found:
                notes.append(f'{file} names {place} for {split}, where no picture is')
        if members:
            groups[split] = sorted(members)
    if 'train' not in groups:
        groups = {}
        for picture in pictures:
            split = split_of(*(parent.name for parent in PurePosixPath(picture).parents)) or ''
            groups.setdefault(split, []).append(picture)
    if groups.get('val') == groups.get('train') and 'val' in groups:
        del groups['val']  # as in YOLO's examples: what follows divides the pictures
    return groups


def _below(root: Path, file: str, base: object, place: str, pictures: list[str]) -> list[str]:
    """The pictures of a folder or list that the YAML file names, by any of YOLO's ways."""
    beside = (root / file).parent
    stripped = place.lstrip('./')  # exports name ../train/images, and mean it beside the YAML file
    bases = [beside / str(base or '.'), beside, root]
    for candidate in [*(b / place for b in bases), beside / stripped, root / stripped]:
        if candidate.is_dir():
            folder = candidate.resolve()
            return [p for p in pictures if _place(root / p).is_relative_to(folder)]
        if candidate.is_file():
            lines = [line.strip() for line in read_text(candidate).splitlines() if line.strip()]
            wanted = {_place(parent / line) for line in lines for parent in bases}
            return [p for p in pictures if _place(root / p) in wanted]
    return []


def _place(picture: Path) -> Path:
    """The absolute path of a picture, which may itself be a link."""
    return picture.parent.resolve() / picture.name


def _annotation(line: str, size: tuple[int, int], pose: bool) -> dict | None:
    """An annotation from `class x y width height` or `class x1 y1 x2 y2 …`, in shares of the size.

    A sixth number of a box is a score. Key points follow a box.
    """
    try:
        number, *values = [float(word) for word in line.split()]
    except ValueError:
        return None
    width, height = size
    if pose or len(values) in (4, 5):
        if len(values) < 4 or not all(0 <= v <= 1.01 for v in values[:4]):
            return None
        x, y, w, h = values[:4]
        return annotation(
            int(number), ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        )
    if len(values) < 6 or len(values) % 2 or not all(-0.01 <= v <= 1.01 for v in values):
        return None
    polygon = [
        round(min(max(v, 0), 1) * side, 2) for v, side in zip(values, size * (len(values) // 2))
    ]
    x, y = min(polygon[::2]), min(polygon[1::2])
    box = x, y, max(polygon[::2]) - x, max(polygon[1::2]) - y
    return annotation(int(number), box, [polygon])
