"""COCO's format: JSON files with images, annotations and categories."""

import json
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from mmslak.datasets.findings import of
from mmslak.datasets.formats.description import DataSet, Sample
from mmslak.datasets.formats.files import is_picture, picture_size, split_of
from mmslak.datasets.formats.objects import INFO, annotation, has_mask, kind_of
from mmslak.errors import UserError, first_few

MANY = 20  # so many JSON files are annotations of single pictures, unless their names say otherwise
NAMES = ('instances', 'coco', 'annotations', 'train', 'val', 'test')


def recognise(root: Path, files: list[str]) -> DataSet | None:
    """Recognises files with images, annotations and categories, and their pictures.

    Raises:
        UserError: If one cannot be read, several are for the same pictures, or no picture is found.
    """
    contents = _read_all(root, files)
    if not contents:
        return None
    where, notes = _where(files), []
    names = ', '.join(contents[file][0] for file in contents)
    sign = f'images, annotations and categories in {names}'
    named = {split: content for split, content in contents.items() if split}
    if '' in contents and named:
        raise UserError(
            f'{root / contents[""][0]}: expected train, val or test in its name, as {sign} are '
            'together; name it so, or give the one file: mmslak new-config FILE'
        )

    classes = _classes(contents, notes)
    data = DataSet(root, 'coco', 'boxes', sign, classes, notes=notes)
    for split, (file, content) in contents.items():
        samples, prefix = _samples(root, file, content, classes, where, notes)
        data.splits[split] = samples
        if prefix is not None:
            data.direct[split] = dict(
                type='CocoDataset', ann_file=file, data_prefix=dict(img=prefix)
            )
    everything = [sample for samples in data.splits.values() for sample in samples]
    data.kind = kind_of(everything, notes)
    return data


def _read_all(root: Path, files: list[str]) -> dict[str, tuple[str, dict]]:
    """(file, content) of each split; '' where neither a file's name nor its folder's tells."""
    candidates = [file for file in files if file.lower().endswith('.json')]
    if len(candidates) > MANY:
        candidates = [f for f in candidates if any(n in PurePosixPath(f).stem for n in NAMES)]
    found = defaultdict(dict)
    for file in candidates:
        content = _read(root / file)
        if content is not None:
            path = PurePosixPath(file)
            split = split_of(path.stem, *(p.name for p in path.parents)) or ''
            found[split][file] = content
    chosen = {}
    for split, contents in found.items():
        # Of COCO's own files; those of captions have no categories.
        best = [file for file in contents if 'instances' in PurePosixPath(file).stem]
        if len(contents) > 1 and len(best) != 1:
            what = f'the split {split!r}' if split else 'the same pictures, as it seems'
            raise UserError(
                f'{len(contents)} files of {root} are for {what}: {first_few(contents)}; give the '
                'one to use: mmslak new-config FILE'
            )
        file = best[0] if len(contents) > 1 else next(iter(contents))
        chosen[split] = file, contents[file]
    return chosen


def _read(path: Path) -> dict | None:
    """The content of a COCO file; None of any other file."""
    try:
        content = json.loads(path.read_bytes().decode('utf-8-sig'))
    except (OSError, ValueError) as error:
        if not any(name in path.stem for name in NAMES):
            return None
        raise UserError(f'{path} cannot be read as JSON: {error}') from error
    keys = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or content.get('info') == INFO:
        return None
    if not all(isinstance(content.get(key), list) for key in keys):
        return None
    entries = [entry for key in keys for entry in content[key]]
    has_objects = all(isinstance(entry, dict) for entry in entries) and any(
        'category_id' in thing for thing in content['annotations']
    )
    return content if has_objects else None


def _classes(contents: dict, notes: list[str]) -> tuple[str, ...]:
    """Names of the categories that occur, in the order of the training file.

    Raises:
        UserError: If a category has no name, or an annotation no category.
    """
    order, used = [], set()
    for split in sorted(contents, key=lambda s: s != 'train'):
        file, content = contents[split]
        try:
            names = {str(c['id']): str(c['name']) for c in content['categories']}
        except (KeyError, TypeError) as error:
            raise UserError(f'{file}: a category without id or name ({error!r})') from error
        order += [name for name in dict.fromkeys(names.values()) if name not in order]
        uses = Counter(str(thing.get('category_id')) for thing in content['annotations'])
        unknown = [number for number in uses if number not in names]
        if unknown:
            raise UserError(
                f'{file}: {of(uses[unknown[0]], "annotation")} with category_id {unknown[0]}, '
                f'which no category has; the categories are {first_few(names, 10)}'
            )
        used |= {names[number] for number in uses}
    unused = [name for name in order if name not in used]
    if unused:
        notes.append(f'left out, since no object is of them: {first_few(unused, 5)}')
    return tuple(name for name in order if name in used)


def _where(files: list[str]) -> dict[str, list[str]]:
    """Paths of the pictures, by their names."""
    where = defaultdict(list)
    for file in filter(is_picture, files):
        where[PurePosixPath(file).name].append(file)
    return where


def _find(name: str, file: str, where: dict[str, list[str]]) -> str | None:
    """The picture of a name in an annotation file: that with the most of its path."""
    wanted = PurePosixPath(name.replace('\\', '/'))
    found = where.get(wanted.name, [])
    if len(found) < 2:
        return found[0] if found else None
    split = split_of(PurePosixPath(file).stem, *(p.name for p in PurePosixPath(file).parents))

    def fit(path: str) -> tuple:
        parts, own = PurePosixPath(path).parts[::-1], wanted.parts[::-1]
        same = next((i for i, (a, b) in enumerate(zip(parts, own)) if a != b), len(own))
        beside = PurePosixPath(path).is_relative_to(PurePosixPath(file).parent)
        return min(same, len(own)), split_of(*parts[1:]) == split, beside

    return max(found, key=fit)


def _samples(
    root: Path,
    file: str,
    content: dict,
    classes: tuple[str, ...],
    where: dict[str, list[str]],
    notes: list[str],
) -> tuple[list[Sample], str | None]:
    """Samples of a file, and the folder of its pictures if it can be used as it is.

    It cannot if pictures are absent or in several places, ids are text or not unique, or parts that
    the metric needs are missing.
    """
    names = {str(c['id']): str(c['name']) for c in content['categories']}
    numbers = {number: classes.index(name) for number, name in names.items() if name in classes}
    order = [name for name in names.values() if name in classes]
    whole = tuple(order) == classes and _is_plain(content)

    things = defaultdict(list)
    for thing in content['annotations']:
        things[str(thing.get('image_id'))].append(thing)
    samples, prefixes, absent = [], set(), []
    for image in content['images']:
        name = str(image.get('file_name'))
        path = _find(name, file, where)
        own = things.pop(str(image.get('id')), [])
        if path is None:
            absent.append(name)
            continue
        is_below = f'/{path}'.endswith(f'/{name}')
        prefixes.add(path[: -len(name)] if is_below else None)
        size = image.get('width'), image.get('height')
        size = size if all(size) else picture_size(root / path)
        objects = [_annotation(thing, numbers, file) for thing in own]
        samples.append(Sample(path, frozenset(o['category_id'] for o in objects), objects, size))
    if not samples:
        raise UserError(
            f'none of the {len(absent)} pictures of {root / file} is in {root}: {first_few(absent)}'
        )
    if absent:
        notes.append(f'absent: {of(len(absent), "picture")} of {file}: {first_few(absent)}')
    if things:
        lost = sum(map(len, things.values()))
        notes.append(f'{of(lost, "annotation")} of {file} without picture')
    usable = whole and not absent and not things and len(prefixes) == 1 and None not in prefixes
    return samples, next(iter(prefixes)) if usable else None


def _is_plain(content: dict) -> bool:
    """Whether MMDetection and COCO's metric can read a file as it is."""
    for key, needs in (
        ('images', ('width', 'height')),
        ('annotations', ('bbox', 'area', 'iscrowd')),
        ('categories', ()),
    ):
        ids = [entry.get('id') for entry in content[key]]
        if not all(isinstance(i, int) for i in ids) or len(set(ids)) < len(ids):
            return False
        if not all(entry.get(need) is not None for entry in content[key] for need in needs):
            return False
    return len({c['name'] for c in content['categories']}) == len(content['categories'])


def _annotation(thing: dict, numbers: dict[str, int], file: str) -> dict:
    """An annotation with what is missing, and the number of its class.

    Raises:
        UserError: If it has neither a box nor polygons.
    """
    number = numbers[str(thing['category_id'])]
    box, mask = thing.get('bbox'), thing.get('segmentation') if has_mask(thing) else None
    if not box and isinstance(mask, list):
        xs, ys = ([v for p in mask for v in p[axis::2]] for axis in (0, 1))
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    try:
        made = annotation(number, box, mask, bool(thing.get('iscrowd')))
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(
            f'{file}: annotation {thing.get("id")} has bbox {box!r}; expected [x, y, width, height]'
        ) from error
    return dict(made, area=thing['area']) if thing.get('area') else made
