"""Samples that cannot be trained on, or are odd, found where they are loaded: file and reason."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mmslak.errors import UserError

# Ends of whole files. Decoders fill what is missing in a truncated JPEG with grey.
ENDINGS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}
PNG_HEADER = 25  # bytes, of which the last one is the bits per channel
TIFF_BITS = 258  # the tag of the bits per channel
EXIF_ORIENTATION = 274  # the tag of the orientation; 1 is upright, 5 to 8 exchange the sides
TAIL = 1024  # bytes in which the end is looked for; some programs append to it
DECODERS = ('cv2', 'pillow', None)  # of transforms that load what check_picture can judge
LABEL_MAPS = ('gt_seg_map', 'gt_depth_map')
# What is odd about a picture or its boxes, and trained on as it is.
ALPHA = 'an alpha channel, which the loader cuts off'
DEEP = 'more than 8 bits per channel, which the loader cuts to 8'
GREY = 'grey, which the loader turns into colour'
CMYK = 'CMYK, which the loader turns into colour'
TURNED = 'turned by the loader as its EXIF orientation says'
RESIZED = 'of another size than the annotation file states'
BEYOND = 'a box that reaches beyond the picture'
TINY = 'a box below one pixel'
LIST_LIMIT = 8 * 2**20  # bytes of a list of odd samples


class BadSampleError(UserError):
    """A sample that cannot be trained on; the message is `file: reason`."""

    of_one_process = True

    def __str__(self) -> str:
        # A loader's worker hands it on with its traceback in the message.
        return super().__str__().rpartition(f'{type(self).__name__}: ')[2].strip()


class GuardedPipeline:
    """A dataset's pipeline whose loading transforms are checked, however deep they stand in it.

    Args:
        pipeline: The dataset's Compose, whose loading transforms are replaced in place.
        classes: Number of classes of label maps; None leaves values unchecked.
        ignored: Value of pixels without a class.
        on_bad: Called with file and reason of a sample that cannot be trained on. It raises; or
            returns False to have the sample left out: MMEngine's datasets then draw another one; or
            returns True to have it loaded all the same.
        on_odd: Called with file and reason of a sample that is odd, and loaded all the same.
    """

    def __init__(
        self,
        pipeline: Callable,
        classes: int | None,
        ignored: int,
        on_bad: Callable[[str, str], bool],
        on_odd: Callable[[str, str], None],
    ) -> None:
        self.pipeline, self.classes, self.ignored = pipeline, classes, ignored
        self.on_bad, self.on_odd = on_bad, on_odd
        for transforms, place in list(loading_transforms(pipeline)):
            transforms[place] = _GuardedLoad(bare(transforms[place]), self)

    def __getattr__(self, name: str) -> object:
        if name == 'pipeline':  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, data: dict) -> dict | None:
        try:
            return self.pipeline(data)
        except _LeftOut:
            return None

    def judge(self, check: Callable[..., Iterable[str]], file: object, *args: object) -> None:
        """Runs a check and does what its findings ask for.

        Whatever the check itself trips over is odd, and the sample goes on.
        """
        try:
            odd = [str(reason) for reason in check(*args)]
        except BadSampleError as error:
            self.bad(error)
            return
        except Exception as error:
            name = check.__name__
            odd = [f'not checked, since {name} ended with {type(error).__name__}: {error}']
        for reason in odd:
            self.on_odd(str(file), ' '.join(reason.split()))

    def bad(self, error: BadSampleError) -> None:
        """Leaves the sample out, unless it is to be loaded all the same."""
        file, _, reason = str(error).partition(': ')
        if not self.on_bad(file, reason):
            raise _LeftOut


class _LeftOut(Exception):  # noqa: N818
    """Takes a sample out of a pipeline, from any depth."""


class _GuardedLoad:
    """A loading transform that is checked before and after it has loaded."""

    def __init__(self, transform: Callable, guard: GuardedPipeline) -> None:
        self.transform, self._guard = transform, guard

    def __getattr__(self, name: str) -> object:
        if name == 'transform':  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.transform, name)

    def __repr__(self) -> str:
        return repr(self.transform)

    def __call__(self, data: dict) -> dict | None:
        transform, guard = self.transform, self._guard
        path = data.get('img_path', data.get('img_id', 'a sample'))
        if reads_pictures(transform):
            picture = data.get('img_path')
            guard.judge(check_picture, picture, picture, is_colour(transform), turns(transform))
        elif reads_labels(transform):
            guard.judge(check_file, data.get('seg_map_path'), data.get('seg_map_path'))
        before = dict(data)
        try:
            loaded = transform(data)
        except Exception as error:  # decoders raise what they like
            path = data.get('seg_map_path') or path if 'img' in data else path
            bad = BadSampleError(f'{path}: {_why(error, transform)}')
            guard.bad(bad)
            raise bad from error  # nothing to go on with
        if isinstance(loaded, dict):
            # What was there before may have been resized since, unless the picture comes last.
            new = loaded
            if 'img' in before:
                new = {k: v for k, v in loaded.items() if v is not before.get(k)}
            if 'img' in new:
                guard.judge(check_stated_size, path, loaded, turns(transform))
            for name in LABEL_MAPS:
                if new.get(name) is not None:
                    where = loaded.get('seg_map_path', path)
                    classes = guard.classes if name == 'gt_seg_map' else None
                    guard.judge(check_label_map, where, loaded, name, classes, guard.ignored)
            if new.get('gt_bboxes') is not None:
                guard.judge(check_boxes, path, loaded)
        return loaded


def _why(error: Exception, transform: object) -> str:
    if isinstance(error, KeyError) and error.args == ('mask',):
        return (
            "an annotation without 'segmentation', of which masks are made: a config that trains "
            f'masks needs it; without with_mask=True of {type(transform).__name__} and without a '
            'mask head, as in Faster R-CNN, boxes are enough'
        )
    return f'cannot be read ({type(error).__name__}: {error})'


def guard(
    dataset: object, on_bad: Callable[[str, str], bool], on_odd: Callable[[str, str], None]
) -> int:
    """Puts a GuardedPipeline into every dataset inside of wrappers.

    Returns:
        Number of samples in all of them.
    """
    total = 0
    for inner in innermost(dataset):
        pipeline = inner.pipeline
        if isinstance(pipeline, GuardedPipeline):
            pipeline = pipeline.pipeline
        if hasattr(pipeline, 'transforms'):
            inner.pipeline = GuardedPipeline(pipeline, *_labels_of(inner), on_bad, on_odd)
        total += len(inner)
    return total


def innermost(dataset: object) -> Iterator[object]:
    """The datasets inside of RepeatDataset, ConcatDataset and other wrappers."""
    parts = getattr(dataset, 'datasets', None)
    inner = getattr(dataset, 'dataset', None) or getattr(dataset, '_dataset', None)
    if parts is not None:
        for part in parts:
            yield from innermost(part)
    elif inner is not None:
        yield from innermost(inner)
    elif hasattr(dataset, 'pipeline'):
        yield dataset


def loading_transforms(node: object, _seen: set[int] | None = None) -> Iterator[tuple[list, int]]:
    """(list, place in it) of the loading transforms of a pipeline.

    Those inside of other transforms are among them: test-time augmentation, choices, branches.
    """
    seen = set() if _seen is None else _seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, list):
        for place, part in enumerate(node):
            if type(bare(part)).__name__.startswith('Load'):
                yield node, place
            else:
                yield from loading_transforms(part, seen)
    elif isinstance(node, (tuple, dict)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from loading_transforms(part, seen)
    elif hasattr(node, 'transforms') or hasattr(node, 'transform'):
        for part in vars(node).values() if hasattr(node, '__dict__') else ():
            yield from loading_transforms(part, seen)


def bare(transform: object) -> object:
    """A transform without the guard around it."""
    return transform.transform if isinstance(transform, _GuardedLoad) else transform


def _labels_of(dataset: object) -> tuple[int | None, int]:
    """(classes, value of none) of a dataset's label maps; the former None where they are unknown.

    Detection datasets have stuff maps too, whose values are not those of their classes.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    known = isinstance(classes, (list, tuple)) and hasattr(dataset, 'ignore_index')
    return len(classes) if known else None, getattr(dataset, 'ignore_index', 255)


# ---------------------------------------------------------------- what a transform reads


def reads_pictures(transform: object) -> bool:
    """Whether a transform loads a picture from the disk that Pillow can look at beforehand."""
    skips = getattr(transform, 'ignore_empty', False)  # what is unreadable, by itself
    return type(transform).__name__ == 'LoadImageFromFile' and _decodes(transform) and not skips


def reads_labels(transform: object) -> bool:
    """Whether it loads a label map that is such a picture."""
    names = 'LoadAnnotations', 'LoadPanopticAnnotations'
    wanted = getattr(transform, 'with_seg', True)
    return type(transform).__name__ in names and wanted and _decodes(transform)


def is_colour(transform: object) -> bool:
    """Whether it makes colour of 8 bits of whatever picture there is."""
    return _color_type(transform).startswith('color')


def turns(transform: object) -> bool:
    """Whether it turns a picture as its EXIF orientation says."""
    kind = _color_type(transform)
    return _decodes(transform) and kind != 'unchanged' and not kind.endswith('ignore_orientation')


def _color_type(transform: object) -> str:
    return str(getattr(transform, 'color_type', 'color'))


def _decodes(transform: object) -> bool:
    storage = getattr(transform, 'backend_args', None) or {}
    storage = storage or getattr(transform, 'file_client_args', None) or {}
    on_disk = storage.get('backend', 'local') in ('local', 'disk')
    return on_disk and getattr(transform, 'imdecode_backend', None) in DECODERS


# ---------------------------------------------------------------- checks


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
        pass  # unknown to Pillow, or too large for it: left to the loader
    return odd


def check_file(path: str | None) -> list[str]:
    """Checks that the file of a picture or label map is there and whole.

    What Pillow does not know is left to its loader.

    Args:
        path: A local file; None and addresses are not checked.

    Returns:
        Nothing that is odd.

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
            _decode(picture)  # cameras append films and more, so that the pixels decide
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
    """Decodes all pixels; an error if some are missing, also where a program has put up with that.

    Raises:
        OSError: If some are missing or damaged.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        picture.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def check_stated_size(data: dict, turned: bool) -> list[str]:
    """Compares a loaded picture with the size that the annotation file states, if it states one.

    Args:
        data: The sample: ori_shape (height, width) of the picture, height and width as stated.
        turned: Whether the loader turns pictures as their EXIF orientation says.

    Returns:
        What is odd about it.

    Raises:
        BadSampleError: If its EXIF orientation has exchanged the sides, so that boxes lie
            elsewhere.
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
        Nothing that is odd.

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
            f'{where}: a label map of {_sides(labels.shape)}, {expected}: it is in colour, and one '
            'number per pixel, the class, is wanted'
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
    """Checks boxes that were just loaded; those that are ignored in training are left alone.

    Args:
        data: The sample: gt_bboxes (N, 4) of left, top, right, bottom in any container; others,
            such as rotated ones, are not checked. ori_shape is (height, width) of the picture.

    Returns:
        What is odd about them.

    Raises:
        BadSampleError: If one is not finite, turned around or without any width or height, of which
            the loss of Faster R-CNN becomes infinite.
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
    """Width × height (× channels), as people say it."""
    height, width, *rest = shape
    return '×'.join(map(str, (width, height, *rest)))


# ---------------------------------------------------------------- whole datasets


def check_sample(dataset: object, index: int) -> tuple[str, str, list[str]]:
    """Loads a sample of a dataset as its pipeline does, without augmentation.

    Args:
        dataset: One with get_data_info and a pipeline, such as `innermost` gives.
        index: Number of the sample.

    Returns:
        File, what is bad about it ('' if nothing is), and what is odd.
    """
    bad, odd = [], []
    pipeline = getattr(dataset.pipeline, 'pipeline', dataset.pipeline)
    # Of a branch or view that is loaded twice, once.
    loading = {repr(bare(ts[i])): bare(ts[i]) for ts, i in loading_transforms(pipeline)}
    guarded = GuardedPipeline(
        _Transforms(list(loading.values())),
        *_labels_of(dataset),
        lambda file, reason: bad.append((file, reason)),
        lambda file, reason: odd.append(reason),
    )
    data = dataset.get_data_info(index)
    path = data.get('img_path', f'sample {index}')
    guarded(data)
    return (*bad[0], odd) if bad else (path, '', odd)


class _Transforms:
    def __init__(self, transforms: list[Callable]) -> None:
        self.transforms = transforms

    def __call__(self, data: dict | None) -> dict | None:
        for transform in self.transforms:
            data = transform(data) if data is not None else None
        return data


_scanned: list = []  # what processes that are forked from this one look at


def scan(dataset: object, workers: int | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """`check_sample` of all samples of the datasets inside of wrappers, in order.

    Args:
        dataset: A dataset of mmseg, mmdet or mmpretrain.
        workers: Processes; None is one per core.
    """
    _scanned[:] = innermost(dataset)
    places = [(part, index) for part, inner in enumerate(_scanned) for index in range(len(inner))]
    with ProcessPoolExecutor(workers, mp_context=get_context('fork')) as pool:
        yield from pool.map(_look, places, chunksize=16)


def _look(place: tuple[int, int]) -> tuple[str, str, list[str]]:
    part, index = place
    return check_sample(_scanned[part], index)


class SampleList:
    """A file of samples and reasons, a line of JSON each, written to by all workers and ranks.

    Args:
        path: The file.
        limit: Bytes from which on nothing is added; None sets no limit.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        self._added: set[tuple[str, str]] = set()
        self._begin()

    def _begin(self) -> None:
        self._read, self._samples, self._files = 0, {}, set()

    def add(self, file: str, reason: str) -> None:
        """Appends a sample that this process has not added before."""
        if (file, reason) in self._added:
            return
        self._added.add((file, reason))
        line = json.dumps(dict(file=file, reason=reason)) + '\n'
        # One write of a line: those of several processes do not mix.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if self.limit is not None and size >= self.limit:
                return
            if size and os.pread(descriptor, 1, size - 1) != b'\n':
                line = '\n' + line  # a process died while it wrote
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, dict[str, None]]:
        """Different files of each reason, in the order of the file; reads what is new in it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._read:  # begun anew
            self._begin()
        if size > self._read:
            with self.path.open('rb') as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b'\n')
            self._read += len(whole + newline)
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    file, reason = entry['file'], entry['reason']
                    self._files.add(file)
                    self._samples.setdefault(reason, {})[file] = None
                except (ValueError, LookupError, TypeError):
                    pass  # not written to its end
        return self._samples

    def count(self) -> int:
        """Number of different files in it."""
        self.read()
        return len(self._files)
