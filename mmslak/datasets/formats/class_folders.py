"""Pictures in folders that are called like their classes."""

from collections import defaultdict
from pathlib import Path

from mmslak.datasets.findings import of
from mmslak.datasets.formats.description import DataSet, Sample
from mmslak.datasets.formats.files import SPLIT_WORDS, is_picture
from mmslak.datasets.formats.label_maps import IMAGE_WORDS, LABEL_WORDS
from mmslak.errors import UserError, first_few

READ = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # by MMPreTrain's CustomDataset


def recognise(root: Path, files: list[str]) -> DataSet | None:
    """Recognises CLASS/…/picture, and the same below train, val and test.

    Raises:
        UserError: If there is one class alone.
    """
    pictures = [file for file in files if is_picture(file)]
    tops = {file.split('/')[0] for file in pictures if '/' in file}
    has_splits = bool(tops) and all(top.lower() in SPLIT_WORDS for top in tops)
    level = 1 if has_splits else 0
    found, loose = defaultdict(lambda: defaultdict(list)), 0
    for file in pictures:
        parts = file.split('/')
        if len(parts) < level + 2:
            loose += 1
        else:
            found[parts[0] if has_splits else ''][parts[level]].append(file)
    classes = sorted({name for folders in found.values() for name in folders})
    if not classes or {c.lower() for c in classes} & (IMAGE_WORDS | LABEL_WORDS):
        return None
    if len(classes) == 1:
        raise UserError(
            f'{root}: {first_few(classes)} is the only folder with pictures; a classifier needs a '
            'folder for each of two classes or more, and other models need labels'
        )

    sign = f'a folder of pictures for each class, such as {next(iter(found))}/{classes[0]}'
    data = DataSet(root, 'class-folders', 'classification', sign.replace(' /', ' '), tuple(classes))
    if loose:
        data.notes.append(f'left out: {of(loose, "picture")} in no folder of a class')
    for top, folders in found.items():
        split = SPLIT_WORDS.get(top.lower(), '')
        numbers = {name: classes.index(name) for name in folders}
        data.splits.setdefault(split, []).extend(
            Sample(path, frozenset([numbers[name]]), numbers[name])
            for name, paths in folders.items()
            for path in paths
        )
        # The library numbers all folders of a split, and passes over other suffixes.
        there = sorted(entry.name for entry in (root / top).iterdir() if entry.is_dir())
        plain = all(p.lower().endswith(READ) for paths in folders.values() for p in paths)
        if there == classes and plain:
            data.direct[split] = dict(type='CustomDataset', data_prefix=top)
    if len({SPLIT_WORDS.get(top.lower()) for top in found}) < len(found):
        data.direct = {}  # two folders for one split
    trained = data.pictures_of_classes('train')
    missing = [name for number, name in enumerate(classes) if not trained[number]]
    if has_splits and missing:
        data.notes.append(f'no picture to train on: {first_few(missing, 5)}')
    return data
