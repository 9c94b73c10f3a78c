"""Small pictures of the files of a data set, with their boxes or labels."""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageOps

SIDE = 220  # pixels of the longer side
LEFT_OUT = 255  # a value of label maps that is mostly that of no class
FEW = 64  # values of a picture of one channel that is taken for a label map
BOX = (255, 210, 0)


def thumbnail(path: str, boxes: Iterable[Sequence[float]] = (), side: int = SIDE) -> Image.Image:
    """A small picture of a file, upright, in RGB.

    Args:
        path: A picture, or a label map of one channel, which gets a colour for each value.
        boxes: (left, top, right, bottom) of boxes to draw, in pixels of the file.
        side: Pixels of its longer side.

    Raises:
        OSError, ValueError, SyntaxError: If it cannot be read.
    """
    with Image.open(path) as file:
        labels = _labels(file)
        if labels is not None:
            picture = Image.fromarray(_COLOURS[labels])
            scale = side / max(picture.size)
            size = [max(1, round(length * scale)) for length in picture.size]
            return picture.resize(size, Image.Resampling.NEAREST)
        picture = ImageOps.exif_transpose(_eight_bits(file))
        width, height = picture.size
        picture.thumbnail((side, side))
        scale = np.tile(picture.size, 2) / np.array([width, height] * 2)
    _draw_boxes(picture, np.array(list(boxes), float).reshape(-1, 4) * scale)
    return picture


def _labels(file: Image.Image) -> np.ndarray | None:
    """(H, W) uint8 of a label map; None of another picture."""
    if file.mode not in ('1', 'L', 'P') or file.format == 'JPEG':
        return None
    values = np.asarray(file).astype(np.uint8)
    few = np.count_nonzero(np.bincount(values.ravel(), minlength=256)) <= FEW
    return values if few else None


def _eight_bits(file: Image.Image) -> Image.Image:
    """A picture in RGB, with its EXIF; deeper ones are scaled to what they hold."""
    if not file.mode.startswith(('I', 'F')):
        return file.convert('RGB')
    values = np.nan_to_num(np.asarray(file).astype(float))
    low, high = values.min(), values.max()
    return Image.fromarray(
        ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    ).convert('RGB')


def _draw_boxes(picture: Image.Image, boxes: np.ndarray) -> None:
    draw = ImageDraw.Draw(picture)
    for box in boxes[np.isfinite(boxes).all(1)]:
        x1, x2 = np.sort(box[::2]).clip(0, picture.width - 1)
        y1, y2 = np.sort(box[1::2]).clip(0, picture.height - 1)
        draw.rectangle((x1, y1, x2, y2), outline=BOX, width=2)


def _colours() -> np.ndarray:
    """(256, 3) uint8: black for 0, white for the value of no class, colours for the others."""
    table = matplotlib.colormaps['tab20'](np.arange(255) % 20, bytes=True)[:, :3]
    return np.concatenate([[[0, 0, 0]], table[:254], [[255, 255, 255]]]).astype(np.uint8)


_COLOURS = _colours()
