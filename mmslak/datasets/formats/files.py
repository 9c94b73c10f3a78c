"""The files of a data set, and what the names of their folders say."""

import os
import re
from pathlib import Path

from PIL import Image

from mmslak.datasets.samples import EXIF_ORIENTATION, PICTURE_SUFFIXES
from mmslak.errors import UserError

SPLIT_WORDS = {
    **dict.fromkeys(('train', 'training', 'trainval'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation'), 'val'),
    **dict.fromkeys(('test', 'testing'), 'test'),
}


def list_files(root: Path) -> list[str]:
    """All files below a folder, as sorted relative paths, without hidden ones."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        hidden = real in seen  # a link that leads back
        seen.add(real)
        folders[:] = [] if hidden else [f for f in folders if not f.startswith(('.', '__MACOSX'))]
        here = Path(folder).relative_to(root)
        if not hidden:
            found += [(here / name).as_posix() for name in names if not name.startswith('.')]
    return sorted(found)


def is_picture(name: str) -> bool:
    """Whether a file looks like a picture by its name."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def words(name: str) -> list[str]:
    """The words of a name in lower case: 'instances_train2017' has 'instances' and 'train'."""
    return re.findall(r'[^\W\d_]+', name.lower())


def split_of(*names: str) -> str | None:
    """The split that the first of some names tells, a whole name before a word of one, or None."""
    for name in (*(n for n in names if n.lower() in SPLIT_WORDS), *names):
        for word in words(name):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: If it is no text.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as text in UTF-8: {error}') from error


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as readers see it, which turn it as its EXIF data says.

    Raises:
        UserError: If it is no picture.
    """
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(EXIF_ORIENTATION, 1) in range(5, 9)
            return picture.size[::-1] if turned else picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} cannot be read as a picture: {error}') from error
