"""Checks of one sample: what makes it bad (an error) or odd (a list of reasons)."""

import os
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mmslak.errors import UserError

PICTURE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
# How whole files end. Decoders fill the missing part of a truncated JPEG with grey.
ENDINGS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}
PNG_HEADER = 25  # bytes, of which the last one is the bits per channel
TIFF_BITS = 258  # the tag of the bits per channel
EXIF_ORIENTATION = 274  # the tag of the orientation; 1 is upright, 5 to 8 exchange the sides
TAIL = 1024  # bytes in which the end is looked for; some programs append to it
# What a person does about a bad sample, and about one of training.
MEND = (
    'repair it or take it out (where new-config wrote the config, then type: mmslak new-config … '
    '--force)'
)
SKIP = 'or train without it: mmslak train … --on-bad-sample skip'
# Reasons for which a sample is odd.
ALPHA = 'an alpha channel, which the loader cuts off'
DEEP = 'more than 8 bits per channel, which the loader cuts to 8'
GREY = 'grey, which the loader turns into colour'
CMYK = 'CMYK, which the loader turns into colour'
TURNED = 'turned by the loader as its EXIF orientation says'
RESIZED = 'of another size than the annotation file states'
BEYOND = 'a box that reaches beyond the picture'
TINY = 'a box below one pixel'


class BadSampleError(UserError):
    """A bad sample, which cannot be trained on; the message is `file: reason`."""

    of_one_process = True

    def __str__(self) -> str:
        # torch puts the traceback of a data worker into the message.
        return super().__str__().rpartition(f'{type(self).__name__}: ')[2].strip()


def check_picture(path: str | None, colour: bool, turned: bool) -> list[str]:
    """Checks a picture's file before it is loaded.

    Args:
        path: A local file; None and addresses are not checked.
        colour: Whether it is to become colour of 8 bits.
        turned: Whether the loader turns it as its EXIF orientation says.

    Returns:
        What is odd about it.

    Raises:
        BadSampleError: See `check_file`.
    """
    check_file(path)
    if not _is_local(path):
        return []
    odd = []
    try:
        with open(path, 'rb') as file, Image.open(file) as picture:
            if turned and picture.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9):
                odd.append(TURNED)
            if not colour:
                return odd
            if picture.mode in ('L', 'LA', '1'):
                odd.append(GREY)
            elif picture.mode == 'CMYK':
                odd.append(CMYK)
            if picture.mode.startswith(('I', 'F')) or _depth(picture, file) > 8:
                odd.append(DEEP)
            if picture.mode in ('RGBA', 'LA', 'PA') or 'transparency' in picture.info:
                odd.append(ALPHA)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        pass  # Pillow does not know it, or it is too large for Pillow
    return odd


def check_file(path: str | None) -> list[str]:
    """Checks that the file of a picture or label map exists and is whole.

    Formats that Pillow does not know are not checked.

    Args:
        path: A local file; None and addresses are not checked.

    Returns:
        An empty list.

    Raises:
        BadSampleError: If it is missing, empty or truncated, or cannot be opened.
    """
    if not _is_local(path):
        return []
    try:
        with open(path, 'rb') as file:
            ending = ENDINGS.get(file.read(2))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            whole = ending is not None and ending in file.read()
    except FileNotFoundError:
        raise BadSampleError(f'{path}: no such file') from None
    except OSError as error:
        raise BadSampleError(f'{path}: cannot be read ({error.strerror})') from error
    if size == 0:
        raise BadSampleError(f'{path}: the file is empty')
    if whole:
        return []
    try:
        with Image.open(path) as picture:
            _decode(picture)  # cameras append films and more: a file is whole if its pixels are
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        if ending is not None and isinstance(error, UnidentifiedImageError):
            raise BadSampleError(f'{path}: truncated ({error})') from error
    except (OSError, ValueError, SyntaxError) as error:
        if ending is not None or 'truncated' in str(error):
            raise BadSampleError(f'{path}: truncated ({error})') from error
    return []


def _is_local(path: object) -> bool:
    return isinstance(path, str) and '://' not in path and not path.startswith('s3:')


def _depth(picture: Image.Image, file: BinaryIO) -> int:
    """Bits per channel; Pillow calls colour of 16 bits RGB as well."""
    if picture.format == 'PNG':
        file.seek(0)
        return file.read(PNG_HEADER)[-1]
    bits = picture.tag_v2.get(TIFF_BITS, 8) if picture.format == 'TIFF' else 8
    return max(bits) if isinstance(bits, tuple) else bits


def _decode(picture: Image.Image) -> None:
    """Decodes all pixels, strictly, whatever a program has told Pillow about truncated files.

    Raises:
        OSError: If some are missing or damaged.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        picture.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def check_stated_size(data: dict, turned: bool) -> list[str]:
    """Compares the size of a loaded picture with the one in the annotation file, if there is one.

    Args:
        data: The sample: ori_shape (height, width) of the picture, height and width as stated.
        turned: Whether the loader turns pictures as their EXIF orientation says.

    Returns:
        What is odd about it.

    Raises:
        BadSampleError: If the EXIF orientation has exchanged the sides, so that boxes are wrong.
    """
    shape, stated = _shape(data), (data.get('height'), data.get('width'))
    if shape is None or not all(isinstance(v, (int, np.integer)) and v > 0 for v in stated):
        return []
    if tuple(shape) == stated:
        return []
    path = data.get('img_path', 'a sample')
    if tuple(shape) == stated[::-1]:
        orientation = exif_orientation(path)
        if turned and orientation >= 5:
            raise BadSampleError(
                f'{path}: loaded as {_sides(shape)}, since its EXIF orientation is {orientation}, '
                f'but the annotations are for {_sides(stated)}: save the picture upright, or set '
                "color_type='color_ignore_orientation' of LoadImageFromFile"
            )
    return [RESIZED]


def exif_orientation(path: str) -> int:
    """The EXIF orientation of a picture, 1 (upright) to 8; 1 where it has none."""
    try:
        with Image.open(path) as picture:
            return int(picture.getexif().get(EXIF_ORIENTATION, 1))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return 1


def check_label_map(data: dict, name: str, classes: int | None, ignored: int = 255) -> list[str]:
    """Checks a label map that was just loaded against the picture as it was loaded.

    Args:
        data: The sample; ori_shape is (height, width) of the picture before it was resized.
        name: Key of the map, (H, W), in it.
        classes: Number of classes; None leaves values unchecked.
        ignored: Value of pixels without a class.

    Returns:
        An empty list.

    Raises:
        BadSampleError: If it is in colour, of another size, or has an unknown class.
    """
    labels, shape = data[name], _shape(data)
    path = data.get('img_path', 'a sample')
    where = data.get('seg_map_path' if name == 'gt_seg_map' else 'depth_map_path') or path
    if not isinstance(labels, np.ndarray) or shape is None or len(shape) != 2:
        return []  # volumes of mmseg's medical data, and containers of others
    expected = f'{_sides(shape)}, the size of its picture, expected'
    if labels.ndim != 2:
        raise BadSampleError(
            f'{where}: a label map of {_sides(labels.shape)}, {expected}: it is in colour, and '
            'should have one number per pixel, the class'
        )
    if tuple(labels.shape) != tuple(shape):
        turned = exif_orientation(path) if _is_local(path) else 1
        why = f' (loaded as its EXIF orientation, {turned}, says)' if turned > 1 else ''
        raise BadSampleError(f'{where}: a label map of {_sides(labels.shape)}, {expected}{why}')
    if classes is not None:
        unknown = (labels >= classes) & (labels != ignored) | (labels < 0)
        if unknown.any():
            raise BadSampleError(
                f'{where}: class {int(labels[unknown][0])}; there are {classes}, from 0, '
                f'and {ignored} for none'
            )
    return []


def check_boxes(data: dict) -> list[str]:
    """Checks boxes that were just loaded, except those that training ignores.

    Args:
        data: The sample: gt_bboxes (N, 4) of left, top, right, bottom in any container; others,
            such as rotated ones, are not checked. ori_shape is (height, width) of the picture.

    Returns:
        What is odd about them.

    Raises:
        BadSampleError: If one is not finite or turned around, or has no width or height, which
            makes the loss of Faster R-CNN infinite.
    """
    boxes, shape = data['gt_bboxes'], _shape(data)
    boxes = np.asarray(getattr(boxes, 'tensor', boxes), np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        return []
    ignored = np.asarray(data.get('gt_ignore_flags', ()), bool)
    if len(ignored) == len(boxes):
        boxes = boxes[~ignored]
    bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if bad.any():
        x1, y1, x2, y2 = boxes[bad][0]
        raise BadSampleError(
            f'{data.get("img_path", "a sample")}: a box that is turned around, empty or not '
            f'finite, ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})'
        )
    odd = []
    if (boxes[:, 2:] - boxes[:, :2] < 1).any():
        odd.append(TINY)
    # By more than a pixel: formats differ in whether borders are counted from 0 or from 1.
    if shape is not None and ((boxes < -1) | (boxes > np.tile(shape[::-1], 2) + 1)).any():
        odd.append(BEYOND)
    return odd


def _shape(data: dict) -> tuple[int, ...] | None:
    """(height, width) of the picture as it was loaded, or (depth, height, width)."""
    if data.get('ori_shape') is not None:
        return tuple(data['ori_shape'])
    image = data.get('img')
    return image.shape[:2] if isinstance(image, np.ndarray) and image.ndim <= 3 else None


def _sides(shape: Iterable[int]) -> str:
    """A shape in words: width × height (× channels)."""
    height, width, *rest = shape
    return '×'.join(map(str, (width, height, *rest)))
