"""Pictures with label maps: a second picture, whose pixels are numbers of classes."""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmslak.datasets.findings import of
from mmslak.datasets.formats.description import SPLITS, DataSet, Sample
from mmslak.datasets.formats.files import SPLIT_WORDS, is_picture, read_text, split_of, words
from mmslak.datasets.label_maps import IGNORED, INDICES
from mmslak.datasets.label_maps import command as mapping_command
from mmslak.errors import UserError, first_few

VOC_LISTS = ('ImageSets', 'Segmentation')
LABEL_WORDS = {
    *('label', 'labels', 'labelmap', 'labelmaps', 'mask', 'masks', 'annotation', 'annotations'),
    *('ann', 'anns', 'annot', 'gt', 'gts', 'groundtruth', 'truth', 'seg', 'segs', 'segmentation'),
    *('segmentations', 'segmentationclass', 'segmentationclasspng', 'gtfine', 'indices', 'targets'),
}
IMAGE_WORDS = {
    *('image', 'images', 'img', 'imgs', 'jpegimages', 'leftimg8bit', 'picture', 'pictures'),
    *('photo', 'photos', 'input', 'inputs', 'rgb'),
}
LABEL_ENDING = re.compile(
    r'[_\-. ](gtFine_labelTrainIds|gtFine_labelIds|labelTrainIds|labelIds|labels?|labelmap|masks?|'
    r'seg|segmentation|gt|annotation|ann|L)$',
    re.IGNORECASE,
)
IMAGE_ENDING = re.compile(r'[_\-. ](leftImg8bit|image|img|sat|rgb)$', re.IGNORECASE)
OTHER_ENDING = re.compile(r'[_\-](colou?r|instance(Ids)?|vis|overlay)$', re.IGNORECASE)


class Look(NamedTuple):
    """What is in a label map.

    Attributes:
        mode: Pillow's mode of the file.
        size: (width, height).
        counts: Pixels of each value; of a colour picture none.
        palette: Red, green and blue of each value; empty without a palette.
    """

    mode: str
    size: tuple[int, int]
    counts: dict[int, int]
    palette: list[list[int]]


def recognise(
    root: Path,
    files: list[str],
    track: Callable[[Iterable, int], Iterable] = lambda items, count: items,
) -> DataSet | None:
    """Recognises pairs of a picture and a label map by folders (`images`, `masks`) or endings.

    Args:
        root: Folder of the data.
        files: Those below it.
        track: Shows how far the reading of label maps is; gets (items, count).

    Raises:
        UserError: If label maps are in colour, JPEGs, or of values that cannot be trained on.
    """
    pairs, notes = find_pairs(files)
    if not pairs:
        return None
    picture, label = pairs[0]
    data = DataSet(root, 'label-maps', 'segmentation', f'pairs such as {picture} and {label}')
    data.notes = notes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = list(track(pool.map(lambda pair: look(root / pair[1]), pairs), len(pairs)))
    _check(root, pairs, looks)

    total = Counter()
    for one in looks:
        total.update(one.counts)
    pixels = sum(total.values())
    data.values = {value: total[value] / pixels for value in sorted(total)}
    if all(one.palette for one in looks):
        data.palette = looks[0].palette
    listed = _lists(root, files)
    for (picture, label), one in zip(pairs, looks):
        path = PurePosixPath(picture)
        split = listed.get(path.stem) if listed else split_of(*(p.name for p in path.parents))
        values = frozenset(one.counts) - {IGNORED}
        data.splits.setdefault(split or '', []).append(Sample(picture, values, label, one.size))
    return data


def _lists(root: Path, files: list[str]) -> dict[str, str]:
    """The split of each name in the lists of a VOC devkit; nothing without lists."""
    splits = {}
    for file in files:
        path = PurePosixPath(file)
        if path.parts[-3:-1] == VOC_LISTS and path.stem in SPLITS and path.suffix == '.txt':
            splits.update(dict.fromkeys(read_text(root / file).split(), path.stem))
    return splits if {'train', 'val'} <= set(splits.values()) else {}


def find_pairs(files: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(picture, label map) of the same name, and notes about what has no partner."""
    pictures = [file for file in files if is_picture(file) or file.lower().endswith('.gif')]
    pictures = [file for file in pictures if 'SegmentationObject' not in file]  # numbers of things
    pictures, notes = _without_sources(pictures)
    by_folder = {file for file in pictures if _is_label_folder(PurePosixPath(file).parent)}
    ending = {f for f in pictures if LABEL_ENDING.search(PurePosixPath(f).stem)}
    labels = by_folder or ending
    labels = {f for f in labels if not OTHER_ENDING.search(PurePosixPath(f).stem)}
    exact, stripped = defaultdict(list), defaultdict(list)
    for label in sorted(labels, key=_preference):
        path = PurePosixPath(label)
        exact[_folder(path), path.stem].append(label)
        stripped[_folder(path), LABEL_ENDING.sub('', path.stem)].append(label)

    pairs, taken, others, alone, double = [], {}, set(), [], []
    for picture in pictures:
        if picture in by_folder or picture in labels or not is_picture(picture):
            continue
        path = PurePosixPath(picture)
        bare = IMAGE_ENDING.sub('', path.stem)
        keys = [(_folder(path), path.stem), (_folder(path), bare)]
        found = next((i[key] for key in keys for i in (exact, stripped) if key in i), None)
        if found is None:
            alone.append(picture)
        elif found[0] in taken:
            double.append(picture)
        else:
            taken[found[0]] = picture
            others.update(found[1:])
            pairs.append((picture, found[0]))
    if double:
        notes.append(
            'left out, since another one has the name and label map: '
            f'{of(len(double), "picture")}: {first_few(double)}'
        )
    if alone and pairs:
        notes.append(f'left out: {of(len(alone), "picture")} without label map: {first_few(alone)}')
    rest = [label for label in sorted(labels) if label not in taken]
    second = [label for label in rest if label in others]
    if second:
        notes.append(
            f'{len(second)} label maps are left out, since their pictures have others: '
            f'{first_few(second)}'
        )
    rest = [label for label in rest if label not in others]
    if rest and pairs:
        notes.append(f'{len(rest)} label maps without picture are left out: {first_few(rest)}')
    return pairs, notes


def _without_sources(files: list[str]) -> tuple[list[str], list[str]]:
    """Files without the label maps of which `mmslak prepare-data labels` has made others; notes."""
    made = {part for file in files for part in map(str, PurePosixPath(file).parents)}
    sources = {folder.removesuffix(INDICES) for folder in made if folder.endswith(INDICES)}
    passed = defaultdict(int)
    kept = []
    for file in files:
        folder = next((f for f in map(str, PurePosixPath(file).parents) if f in sources), None)
        if folder is None:
            kept.append(file)
        else:
            passed[folder] += 1
    notes = [
        f'{folder}: {count} label maps are passed over, since {folder}{INDICES} was made of them'
        for folder, count in passed.items()
    ]
    return kept, notes


def _is_label_folder(folder: PurePosixPath) -> bool:
    return any(set(_words(part)) & LABEL_WORDS for part in folder.parts)


def _words(name: str) -> list[str]:
    """Words of the name of a folder; 'trainannot' is two."""
    found = words(name)
    return [
        w for word in found for w in re.sub(r'^(train|val|test)(annot)$', r'\1 \2', word).split()
    ]


def _folder(path: PurePosixPath) -> tuple[str, ...]:
    """The folders of a picture without the words that tell pictures from label maps."""
    both, folders, parts = LABEL_WORDS | IMAGE_WORDS, [], path.parent.parts
    # Of a folder of any name, `mmslak prepare-data labels` makes NAME_indices.
    is_named = not _is_label_folder(PurePosixPath(*(part.removesuffix(INDICES) for part in parts)))
    for part in parts:
        if part.lower() not in both:
            rest = [word for word in _words(part) if word not in both]
            if is_named and part.endswith(INDICES):
                rest = [word for word in rest if word in SPLIT_WORDS]
            folders.append('_'.join(rest + re.findall(r'\d+', part)))
    return tuple(filter(None, folders))


def _preference(label: str) -> tuple:
    """Label maps of indices go before those of colours, and Cityscapes' training numbers first."""
    return 'indices' not in words(label), 'labelTrainIds' not in label, label


def data_folder(labels: Path) -> Path:
    """The folder of the data whose label maps are in a folder: the first above it with a name of
    its own, such as data of data/masks/train."""
    folder = labels.parent
    while _is_label_folder(PurePosixPath(folder.name)) or folder.name.lower() in SPLIT_WORDS:
        folder = folder.parent
    return folder


def parts(picture: str, label: str) -> tuple[str, str, str, str, str]:
    """(folder of pictures, folder of label maps, suffix, suffix, name) of a pair.

    The name is what both paths have between folder and suffix: a/b of images/a/b.jpg and
    masks/a/b_mask.png.
    """
    one, other = PurePosixPath(picture), PurePosixPath(label)
    stems = one.stem, IMAGE_ENDING.sub('', one.stem), os.path.commonprefix([one.name, other.name])
    stem = next(stem for stem in stems if other.name.startswith(stem))
    folders, others = list(one.parent.parts), list(other.parent.parts)
    shared = []
    while folders and others and folders[-1] == others[-1]:
        shared.insert(0, folders.pop())
        others.pop()
    name = '/'.join([*shared, stem])
    suffixes = one.name[len(stem) :], other.name[len(stem) :]
    return '/'.join(folders), '/'.join(others), *suffixes, name


def look(path: Path) -> Look:
    """Reads a label map.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            mode, size, palette = picture.mode, picture.size, []
            if mode == 'P' and picture.getpalette():
                colours = picture.getpalette('RGB')
                palette = [colours[i : i + 3] for i in range(0, len(colours), 3)]
            if mode not in ('1', 'L', 'P') and not mode.startswith('I'):
                return Look(mode, size, {}, [])
            mode = 'JPEG' if picture.format == 'JPEG' else mode
            if mode.startswith('I'):
                values, counts = np.unique(np.asarray(picture), return_counts=True)
                return Look(mode, size, dict(zip(values.tolist(), counts.tolist())), [])
            counts = picture.histogram()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} cannot be read as a label map: {error}') from error
    if mode == '1':
        counts = [counts[0], counts[255]]  # loaders give 0 and 1
    return Look(mode, size, {v: n for v, n in enumerate(counts) if n}, palette)


def command(root: Path, label: str, *mapping: str) -> str:
    """The command that makes indices of the label maps in a folder, or lists them.

    Args:
        root: Of the data.
        label: A label map below it.
        mapping: Pairs VALUE:INDEX; without one, the command lists values and writes the next one.
    """
    folders = PurePosixPath(label).parent.parts
    place = next((i for i, name in enumerate(folders) if set(_words(name)) & LABEL_WORDS), None)
    if place is None:  # the pictures are there, too
        folder, first = root / 'masks', 'put the label maps into a folder of their own, then '
    else:
        folder, first = root.joinpath(*folders[: place + 1]), ''
    if mapping:
        return first + mapping_command(folder, '--map', *mapping)
    return first + shlex.join(['mmslak', 'prepare-data', 'labels', str(folder)])


def _check(root: Path, pairs: list[tuple[str, str]], looks: list[Look]) -> None:
    labels = [label for _, label in pairs]
    for label, one in zip(labels, looks):
        if not one.counts:
            raise UserError(
                f'{root / label} is in colour ({one.mode}); expected numbers of classes: '
                f'{command(root, label)} lists the colours, and the command that makes numbers of '
                'them'
            )
        if one.mode == 'JPEG':
            raise UserError(
                f'{root / label} is a JPEG, whose values are blurred ({len(one.counts)} of them); '
                f'expected PNGs: {command(root, label)} lists the values, and the command that '
                'makes PNGs'
            )
        if max(one.counts) > IGNORED:
            raise UserError(
                f'{root / label} has the value {max(one.counts)}; expected 0 to 254, and 255 for '
                f'pixels of no class: {command(root, label)} lists the values, and the command '
                'that renumbers them'
            )
    values = {value for one in looks for value in one.counts}
    if IGNORED in values and values <= {0, IGNORED}:
        raise UserError(
            f'the label maps have the values {", ".join(map(str, sorted(values)))} alone, and 255 '
            f'stands for pixels of no class; make it class 1: {command(root, labels[0], "255:1")}'
        )


def shares(data: DataSet) -> list[str]:
    """The values of label maps that may be classes, each with its share of the pixels."""
    values = {value: share for value, share in data.values.items() if value != IGNORED}
    return [f'{v} ({f"{share:.0%}" if share >= 0.01 else "<1%"})' for v, share in values.items()]


def name_classes(data: DataSet, names: Sequence[str], ignored: int = IGNORED) -> None:
    """Gives the values of label maps their names, in place.

    Args:
        data: What `recognise` has found.
        names: Of the values from 0 on, or from 1 on where 0 is no class.
        ignored: The value of pixels without a class: 255, or 0, which may stand beside 255.

    Raises:
        UserError: If the names do not fit the values.
    """
    values = [value for value in data.values if value != IGNORED]
    label = next(iter(data.splits.values()))[0].label
    if ignored not in (0, IGNORED):
        raise UserError(
            f'--ignore {ignored}: the libraries ignore 255, or 0; '
            f'{command(data.root, label, f"{ignored}:255")} makes it so'
        )
    data.ignore_zero = ignored == 0 or (0 not in values and len(names) == max(values))
    first = int(data.ignore_zero)
    needed = max(values) - first + 1
    if len(names) < needed:
        shown = first_few(shares(data), 20)
        renumbered = [f'{v}:{i}' for i, v in enumerate(values) if v != i]
        hint = f'; or renumber them: {command(data.root, label, *renumbered)}'
        if 0 in values and not first and len(names) == needed - 1:
            one = repr(names[0])
            hint = f': one is missing. If 0 is no class, and {one} is the name of 1, add --ignore 0'
        elif len(values) >= max(values):
            hint = ''
        raise UserError(
            f'--classes has {len(names)} names, but the label maps have the values {shown}: '
            f'{needed} names are needed, for {first} to {max(values)}{hint}'
        )
    if ignored == 0 and 0 in values and names[0].lower() == 'background':
        # As LoveDA has it. Of most data 0 is the background, and all names would move by one.
        data.notes.append(
            f'0 is no class, and {names[0]!r} is the name of 1; if it is 0, leave out --ignore 0'
        )
    if len(names) < 2:
        raise UserError(
            f'one class alone, {names[0]!r}: nothing could be learnt; a class for all the other '
            'pixels is needed, often 0 (leave --ignore 0 out)'
        )
    data.classes = tuple(names)
    for split, samples in data.splits.items():
        data.splits[split] = [
            replace(s, classes=frozenset(v - first for v in s.classes if v >= first))
            for s in samples
        ]
    data.palette = data.palette[first : first + len(names)]
    if len(data.palette) < len(names) or len(set(map(tuple, data.palette))) < len(names):
        data.palette = []  # of another number of classes, or with one colour for two
