"""Data of people, recognised by its files: COCO, YOLO, VOC, label maps, class folders."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mmslak.datasets.findings import of
from mmslak.datasets.formats import class_folders, coco, label_maps, voc, yolo
from mmslak.datasets.formats.description import DataSet
from mmslak.datasets.formats.files import is_picture, list_files
from mmslak.datasets.formats.split import divide
from mmslak.errors import UserError, first_few

# In the order in which they are tried: annotation files tell more than folders.
FORMATS = {
    'coco': coco.recognise,
    'yolo': yolo.recognise,
    'voc': voc.recognise,
    'label-maps': label_maps.recognise,
    'class-folders': class_folders.recognise,
}
EXPECTED = (
    'expected COCO files with pictures, YOLO text files with a YAML file, VOC XML files with '
    'pictures, pictures with label maps in folders such as images and masks, or a folder of '
    'pictures for each class (docs/your-data.md draws them)'
)


def recognise(
    path: Path,
    formats: Iterable[str] = FORMATS,
    track: Callable[[Iterable, int], Iterable] = lambda items, count: items,
) -> DataSet:
    """Recognises a person's data, and divides it where it has no split.

    Args:
        path: A folder, or the annotation file to use: JSON of COCO, YAML of YOLO.
        formats: Those to try.
        track: Shows how far the reading of label maps is; gets (items, count).

    Raises:
        UserError: If nothing is recognised, or what is recognised cannot be read.
    """
    if not path.exists():
        raise UserError(f'{path}: no such folder')
    root, files = _files(path)
    if not any(map(is_picture, files)):
        kinds = Counter(Path(file).suffix for file in files)
        raise UserError(f'{root}: no picture in it; there are {first_few(kinds)}; {EXPECTED}')
    known = {**FORMATS, 'label-maps': partial(label_maps.recognise, track=track)}
    for name in formats:
        data = known[name](root, files)
        if data is not None:
            return data
    kinds = Counter(Path(file).suffix for file in files)
    shown = first_few((f'{n} {kind or "without suffix"}' for kind, n in kinds.most_common()), 4)
    raise UserError(f'{root}: not recognised ({shown}); {EXPECTED}')


def _files(path: Path) -> tuple[Path, list[str]]:
    """The root of the data and its files; of annotation files, only the one that is given."""
    if path.is_dir():
        return path, list_files(path)
    for root in (path.parent, path.parent.parent):
        files = list_files(root)
        if any(map(is_picture, files)):
            break
    other = ('.json', '.yaml', '.yml')
    return root, [f for f in files if not f.lower().endswith(other) or root / f == path]


def complete_splits(data: DataSet) -> str:
    """Makes what is missing of train and val, in place.

    Returns:
        In words, where they come from.
    """
    loose = data.splits.pop('', [])
    if loose and 'train' in data.splits:
        data.notes.append(f'left out: {of(len(loose), "picture")} of no split')
    elif loose:
        data.splits['train'] = loose
        data.direct = {split or 'train': read for split, read in data.direct.items()}
    if not data.splits.get('train'):
        raise UserError(f'{data.root} has pictures of {" and ".join(data.splits)} alone, no train')
    if 'val' in data.splits:
        return 'as the data has them'
    if 'test' in data.splits:
        for part in (data.splits, data.direct):
            if 'test' in part:
                part['val'] = part.pop('test')
        return 'as the data has them, and val is its test set'
    pool = data.splits['train']
    train, val = divide(pool)
    data.splits = {'train': train, 'val': val}
    data.direct = {}
    if train == val:
        return 'too few pictures to spare one: val is train, and its scores say nothing'
    return 'a fifth for val, by a hash of the names, for each class alike'
