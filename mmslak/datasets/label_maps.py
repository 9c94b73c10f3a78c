"""Reads label maps as people have them, and makes indices of their values or colours.

A label map has one value per pixel: that of its only channel, or its colour. Both are held as one
integer, 0xRRGGBB for a colour.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import UserError, reason

SUFFIXES = tuple(dict.fromkeys(('.png', '.jpg', *PICTURE_SUFFIXES, '.gif')))  # usual ones first
LARGEST = 255  # of an index; what is written has 8 bits
INDICES = '_indices'  # behind the name of a folder, that of its label maps after mapping
IGNORED = 255  # the value of pixels without a class, where nothing else is set
KEPT = 256  # values of a file that are counted each; a photograph has as many as it has pixels
FEW, MANY = 8, 48  # values of a label map, above which a JPEG, or another picture, is blurred
NEAR = 24  # how far blur moves most values
ONE_CHANNEL = ('1', 'L', 'P', 'LA', 'PA', 'I', 'F')


class LabelMapError(UserError):
    """A label map that cannot be read, or not with the mapping that was given."""


def find_label_maps(folder: Path) -> list[Path]:
    """All pictures below a folder, whatever the case of their suffixes, in order."""
    return sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith('.')
    )


def read_values(path: Path, colours: bool | None = None) -> tuple[np.ndarray, bool]:
    """Reads a label map.

    Args:
        path: A picture. Pictures with a palette hold indices, as the data set classes read them.
        colours: Whether to read colours, which every picture of 8 bits has, or the values of one
            channel, which a picture of three has if they are the same; None is what is there.

    Returns:
        (H, W) int32, and whether they are colours.

    Raises:
        LabelMapError: If it cannot be read, or not as asked for.
    """
    try:
        with Image.open(path) as picture:
            one_channel = picture.mode in ONE_CHANNEL or picture.mode.startswith('I;16')
            if one_channel and not colours:
                return _one_channel(path, picture), False
            if picture.mode.startswith(('I', 'F')):
                raise LabelMapError(
                    f'{path}: one channel of more than 8 bits, which has no colours: map values'
                )
            pixels = np.asarray(picture.convert('RGB')).astype(np.int32)
    except LabelMapError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LabelMapError(f'{path}: cannot be read as a picture ({reason(error)})') from error
    red, green, blue = (pixels[..., channel] for channel in range(3))
    if not colours and (red == green).all() and (green == blue).all():
        return red, False
    values = red << 16 | green << 8 | blue
    if colours is False:
        found = ', '.join(name_of(value, True) for value, _ in Counter(values.flat).most_common(4))
        raise LabelMapError(f'{path}: in colour ({found}, …), so that its colours are to be mapped')
    return values, True


def _one_channel(path: Path, picture: Image.Image) -> np.ndarray:
    values = np.asarray(picture)
    values = values[..., 0] if values.ndim == 3 else values  # beside an alpha channel
    if values.dtype.kind == 'f' and not (values == values.round()).all():
        raise LabelMapError(f'{path}: values with fractions, such as {values.max():g}')
    return values.astype(np.int32)


def name_of(value: int, colours: bool) -> str:
    """A value as it is written in a mapping."""
    return f'#{value:06x}' if colours else str(value)


def command(source: str | Path, *arguments: str) -> str:
    """The command that makes indices of the label maps in a folder; `arguments` has its --map."""
    words = ['mmslak', 'prepare-data', 'labels', str(source), f'{source}{INDICES}', *arguments]
    return shlex.join(words)


def parse_mapping(pairs: Iterable[str]) -> tuple[dict[int, int], bool]:
    """Reads a mapping as it is typed.

    Args:
        pairs: Each KEY:INDEX, where KEY is a value (255), or a colour (#800000 or 128,0,0).

    Returns:
        The mapping, and whether it is one of colours.

    Raises:
        UserError: If one is malformed or given twice, or values and colours are mixed.
    """
    mapping, kinds = {}, set()
    for pair in pairs:
        key, _, index = pair.rpartition(':')
        value = _parse_key(key)
        if value is None or not index.isdecimal() or int(index) > LARGEST:
            raise UserError(
                f'--map {pair}: expected VALUE:INDEX such as 255:1, or COLOUR:INDEX such as '
                f"'#800000:1' or 128,0,0:1; an index is at most {LARGEST}"
            )
        if mapping.setdefault(value, int(index)) != int(index):
            raise UserError(f'--map {pair}: {key} is also mapped to {mapping[value]}')
        kinds.add(not key.isdecimal())
    if len(kinds) > 1:
        raise UserError('--map has values and colours: a grey value such as 7 has colour 7,7,7')
    return mapping, kinds == {True}


def _parse_key(key: str) -> int | None:
    if key.isdecimal():
        return int(key)
    if re.fullmatch('#[0-9a-fA-F]{6}', key):
        return int(key[1:], 16)
    if re.fullmatch(r'\(?\d+, ?\d+, ?\d+\)?', key):
        red, green, blue = (int(part) for part in key.strip('()').split(','))
        if max(red, green, blue) <= 255:
            return red << 16 | green << 8 | blue
    return None


def to_indices(
    values: np.ndarray,
    mapping: Mapping[int, int],
    colours: bool,
    unknown: int | None = None,
    nearest: bool = False,
) -> np.ndarray:
    """Maps the values of a label map.

    Args:
        values: (H, W) integers, from `read_values`.
        mapping: Index of each value or colour.
        colours: Whether they are colours.
        unknown: Index of those that are not in the mapping. None leaves values as they are and
            refuses colours.
        nearest: Whether those that are not in the mapping are taken for the nearest that is.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: Names what is left without an index, with the number of its pixels.
    """
    found = np.unique(values)
    indices = np.array([mapping.get(value, -1) for value in found.tolist()])
    rest = indices < 0
    if nearest:
        indices[rest] = _nearest(found[rest], mapping, colours)
    elif unknown is not None:
        indices[rest] = unknown
    else:
        lost = rest & (colours | (found < 0) | (found > LARGEST))
        if lost.any():
            _, pixels = np.unique(values, return_counts=True)
            raise UnmappedError(dict(zip(found[lost].tolist(), pixels[lost].tolist())), colours)
        indices[rest] = found[rest]
    return indices.astype(np.uint8)[np.searchsorted(found, values)]


class UnmappedError(UserError):
    """Values that get no index.

    Attributes:
        pixels: Number of pixels of each.
    """

    def __init__(self, pixels: dict[int, int], colours: bool) -> None:
        self.pixels = pixels
        what = 'colour' if colours else 'value'
        most = sorted(pixels, key=pixels.get, reverse=True)
        shown = ', '.join(f'{name_of(v, colours)} ({pixels[v]} pixels)' for v in most[:4])
        rest = f' and {len(most) - 4} more' if len(most) > 4 else ''
        super().__init__(f'{what} {shown}{rest}')


def _nearest(values: np.ndarray, mapping: Mapping[int, int], colours: bool) -> np.ndarray:
    """Indices of the keys that are nearest to some values, by the sum of squared differences."""
    here, best = _channels(values, colours), np.inf
    indices = np.zeros_like(values)
    for key, index in mapping.items():  # one by one: a photograph has as many colours as pixels
        distance = ((here - _channels(np.array([key]), colours)) ** 2).sum(1)
        indices = np.where(distance < best, index, indices)
        best = np.minimum(distance, best)
    return indices


def _channels(values: np.ndarray, colours: bool) -> np.ndarray:
    """(N, 3) or (N, 1) of N values."""
    return values[:, None] >> np.array([16, 8, 0]) & 255 if colours else values[:, None]


# ---------------------------------------------------------------- what is in them


def count_values(path: Path, colours: bool | None = None) -> tuple[Counter, bool]:
    """Counts the pixels of each value of a label map.

    Args:
        path: As for `read_values`.
        colours: Likewise.

    Returns:
        Pixels by value, and whether values are colours. Of more than `KEPT` values the most
        frequent ones are named, and the others are counted under None.

    Raises:
        LabelMapError: As `read_values`.
    """
    values, colours = read_values(path, colours)
    found, pixels = np.unique(values, return_counts=True)
    counts = Counter(dict(zip(found.tolist(), pixels.tolist())))
    kept = Counter(dict(counts.most_common(KEPT)))
    if len(counts) > KEPT:
        kept[None] = counts.total() - kept.total()
    return kept, colours


def is_blurred(path: Path, counts: Counter) -> bool:
    """Whether a label map has more values than classes: JPEG and smooth borders blur them."""
    return len(counts) > (FEW if path.suffix.lower() in ('.jpg', '.jpeg') else MANY)


def _sharp(counts: Counter, colours: bool) -> list[int]:
    """Values that blur came from: frequent ones that are not near to a more frequent one."""
    kept, least = [], counts.total() / 100
    for value, pixels in counts.most_common():
        if value is None or (pixels < least and len(kept) > 1):
            continue
        here = _channels(np.array([value]), colours)
        if all(np.abs(_channels(np.array([v]), colours) - here).max() > NEAR for v in kept):
            kept.append(value)
    return kept


def suggest_mapping(counts: Counter, colours: bool, blurred: bool = False) -> dict[int, int]:
    """A mapping to start from, with indices from 0.

    Args:
        counts: Pixels by value.
        colours: Whether values are colours. Black becomes 0, the others follow by their share.
        blurred: Whether the rarer values come from blur, so that only frequent ones are mapped.

    Returns:
        Indices by value; nothing if the values are indices already, of which a few do not occur.
    """
    frequent = [value for value, _ in counts.most_common() if value is not None]
    if blurred:
        frequent = _sharp(counts, colours)
    if colours:
        ordered = sorted(frequent, key=lambda value: value != 0)
        return {value: index for index, value in enumerate(ordered)}
    ordered = sorted(frequent)
    if blurred:
        return {value: rank for rank, value in enumerate(ordered)}
    if ordered != [0, IGNORED]:
        ordered = [value for value in ordered if value != IGNORED]
    gaps = max(ordered, default=0) + 1 - len(ordered)
    if gaps <= len(ordered):
        return {}  # indices, of which some do not occur
    return {value: rank for rank, value in enumerate(ordered) if value != rank}
