"""Samples that cannot be trained on, found where they are loaded: file and reason."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

# Ends of whole files. Decoders fill what is missing in a truncated JPEG with grey.
ENDINGS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}
PNG_HEADER = 25  # bytes, of which the last one is the bits per channel
TIFF_BITS = 258  # the tag of the bits per channel
TAIL = 1024  # bytes in which the end is looked for; some programs append to it
DECODERS = ('cv2', 'pillow', None)  # of transforms that load what check_file can judge


class BadSampleError(ValueError):
    """A sample that cannot be trained on; the message is `file: reason`."""

    def __str__(self) -> str:
        # A loader's worker hands it on with its traceback in the message.
        return super().__str__().rpartition(f'{type(self).__name__}: ')[2].strip()


class GuardedPipeline:
    """A dataset's pipeline that checks what it loads.

    Args:
        pipeline: The dataset's Compose.
        classes: Number of classes of label maps; None leaves values unchecked.
        ignored: Value of pixels without a class.
        on_bad: Called with file and reason. It raises, or returns to have the sample skipped:
            MMEngine's datasets then draw another one.
    """

    def __init__(
        self,
        pipeline: Callable,
        classes: int | None,
        ignored: int,
        on_bad: Callable[[str, str], None],
    ) -> None:
        self.pipeline, self.classes, self.ignored, self.on_bad = pipeline, classes, ignored, on_bad

    def __getattr__(self, name: str) -> object:
        if name == 'pipeline':  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, data: dict) -> dict | None:
        try:
            for transform in self.pipeline.transforms:
                if reads_pictures(transform):
                    check_file(data.get('img_path'), is_colour(transform))
                elif reads_labels(transform):
                    check_file(data.get('seg_map_path'), image=False)
            for transform in self.pipeline.transforms:
                loads = type(transform).__name__.startswith('Load')
                data = self._load(transform, data) if loads else transform(data)
                if data is None:
                    return None
        except BadSampleError as error:
            self.on_bad(*str(error).split(': ', 1))
            return None
        return data

    def _load(self, transform: Callable, data: dict) -> dict | None:
        path = data.get('img_path', data.get('img_id', 'a sample'))
        try:
            loaded = transform(data)
        except Exception as error:  # decoders raise what they like
            text = ' '.join(str(error).split())
            path = data.get('seg_map_path') or path if 'img' in data else path
            raise BadSampleError(f'{path}: cannot be read ({type(error).__name__}: {text})') from (
                error
            )
        if loaded is not None:
            check_loaded(loaded, self.classes, self.ignored, is_colour(transform))
        return loaded


def guard(dataset: object, on_bad: Callable[[str, str], None]) -> int:
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
            inner.pipeline = GuardedPipeline(pipeline, *_labels_of(inner), on_bad)
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


def _labels_of(dataset: object) -> tuple[int | None, int]:
    """(classes, value of none) of a dataset's label maps; the former None where they are unknown.

    Detection datasets have stuff maps too, whose values are not those of their classes.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    known = classes and hasattr(dataset, 'ignore_index')
    return len(classes) if known else None, getattr(dataset, 'ignore_index', 255)


def reads_pictures(transform: object) -> bool:
    """Whether a transform loads a picture from the disk that Pillow can look at beforehand."""
    return type(transform).__name__ == 'LoadImageFromFile' and _decodes(transform)


def reads_labels(transform: object) -> bool:
    """Whether it loads a label map that is such a picture."""
    names = 'LoadAnnotations', 'LoadPanopticAnnotations'
    return type(transform).__name__ in names and _decodes(transform)


def is_colour(transform: object) -> bool:
    """Whether it makes colour of 8 bits of whatever picture there is."""
    kind = getattr(transform, 'color_type', 'color')
    return reads_pictures(transform) and kind.startswith('color')


def _decodes(transform: object) -> bool:
    storage = getattr(transform, 'backend_args', None) or {}
    storage = storage or getattr(transform, 'file_client_args', None) or {}
    on_disk = storage.get('backend', 'local') in ('local', 'disk')
    return on_disk and getattr(transform, 'imdecode_backend', None) in DECODERS


def check_file(path: str | None, image: bool = True) -> None:
    """Checks that a file is there, whole, and of a kind that its loader does not distort.

    Grey pictures pass: loaders make colour of them.

    Args:
        path: A local file; None and addresses are not checked.
        image: A picture that is to become colour of 8 bits; else it has to be whole only, and what
            Pillow does not know is left to its loader.

    Raises:
        BadSampleError: If not.
    """
    if not isinstance(path, str) or '://' in path or path.startswith('s3:'):
        return
    whole = True
    try:
        with open(path, 'rb') as file:
            header = file.read(PNG_HEADER)
            ending = ENDINGS.get(header[:2])
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            whole = ending is None or ending in file.read()
        if size == 0:
            raise BadSampleError(f'{path}: the file is empty')
        with Image.open(path) as picture:
            if not whole or ending is None:
                # Cameras append films and more, so that the pixels decide.
                _decode(picture)
            mode, info = picture.mode, picture.info
            depth = _depth(picture, header)
    except FileNotFoundError:
        raise BadSampleError(f'{path}: no such file') from None
    except BadSampleError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if not image and ending is None and isinstance(error, UnidentifiedImageError):
            return
        reason = 'no picture' if whole else 'truncated'
        raise BadSampleError(f'{path}: {reason} ({error})'.replace('\n', ' ')) from error
    if not image:
        return
    if mode.startswith('I') or mode == 'F':
        raise BadSampleError(f'{path}: more than 8 bits per channel (mode {mode}), which are cut')
    if depth > 8:
        raise BadSampleError(f'{path}: {depth} bits per channel, which are cut to 8')
    if mode in ('RGBA', 'LA', 'PA') or 'transparency' in info:
        raise BadSampleError(f'{path}: has an alpha channel, below which colours are arbitrary')


def _depth(picture: Image.Image, header: bytes) -> int:
    """Bits per channel; Pillow calls colour of 16 bits RGB as well."""
    if picture.format == 'PNG':
        return header[PNG_HEADER - 1]
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


def check_loaded(data: dict, classes: int | None, ignored: int = 255, colour: bool = False) -> None:
    """Checks what a loading transform has put into a sample.

    Args:
        data: The sample: img (H, W, C), gt_seg_map (H, W), gt_bboxes (N, 4).
        classes: Number of classes in label maps; None leaves them unchecked.
        ignored: Value of pixels without a class.
        colour: Whether `img` should be colour of 8 bits.

    Raises:
        BadSampleError: On a picture that is no colour picture of 8 bits, a label map of another
            size or with an unknown class, an empty or degenerate box.
    """
    path = data.get('img_path', 'a sample')
    image, labels = data.get('img'), data.get('gt_seg_map')
    if colour and isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 1
        if channels != 3 or image.dtype == np.uint16:
            raise BadSampleError(
                f'{path}: {channels} channels of {image.dtype}; colour of 8 bits expected'
            )
    if isinstance(labels, np.ndarray):
        where = data.get('seg_map_path', path)
        volume = isinstance(image, np.ndarray) and image.ndim > 3
        flat = labels.ndim == 2 and (image is None or labels.shape == image.shape[:2])
        if not flat and not volume:
            expected = f'{image.shape[1]}×{image.shape[0]}' if image is not None else 'a plane'
            sides = '×'.join(map(str, (labels.shape[1], labels.shape[0], *labels.shape[2:])))
            raise BadSampleError(f'{where}: a label map of {sides}, {expected} expected')
        if classes is not None:
            unknown = (labels >= classes) & (labels != ignored) | (labels < 0)
            if unknown.any():
                raise BadSampleError(
                    f'{where}: class {int(labels[unknown][0])}; there are {classes}, from 0, '
                    f'and {ignored} for none'
                )
    boxes = data.get('gt_bboxes')
    if boxes is not None:
        boxes = np.asarray(getattr(boxes, 'tensor', boxes), np.float64).reshape(len(boxes), -1)
        if boxes.shape[1] == 4 and len(boxes):
            bad = ~np.isfinite(boxes).all(1) | ~(boxes[:, 2:] > boxes[:, :2]).all(1)
            if bad.any():
                x1, y1, x2, y2 = boxes[bad][0]
                raise BadSampleError(
                    f'{path}: an empty or degenerate box ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})'
                )


def check_sample(dataset: object, index: int) -> tuple[str, str, str]:
    """Loads a sample of a dataset as its pipeline does, without augmentation.

    Args:
        dataset: One with get_data_info and a pipeline, such as `innermost` gives.
        index: Number of the sample.

    Returns:
        File, what is bad about it ('' if nothing is), and what is worth to know ('' likewise).
    """
    found = []
    pipeline = getattr(dataset.pipeline, 'pipeline', dataset.pipeline)
    loading = [t for t in pipeline.transforms if type(t).__name__.startswith('Load')]
    guarded = GuardedPipeline(
        _Transforms(loading),
        *_labels_of(dataset),
        lambda file, reason: found.append((file, reason)),
    )
    data = dataset.get_data_info(index)
    path = data.get('img_path', f'sample {index}')
    guarded(data)
    if found:
        return *found[0], ''
    if not any(map(is_colour, loading)):
        return path, '', ''
    with contextlib.suppress(OSError, ValueError), Image.open(path) as picture:
        if picture.mode in ('L', 'LA', '1'):
            return path, '', 'grey pictures, which loaders turn into colour'
    return path, '', ''


class _Transforms:
    def __init__(self, transforms: list[Callable]) -> None:
        self.transforms = transforms


_scanned: list = []  # what processes that are forked from this one look at


def scan(dataset: object, workers: int | None = None) -> Iterator[tuple[str, str, str]]:
    """`check_sample` of all samples of the datasets inside of wrappers, in order.

    Args:
        dataset: A dataset of mmseg, mmdet or mmpretrain.
        workers: Processes; None is one per core.
    """
    _scanned[:] = innermost(dataset)
    places = [(part, index) for part, inner in enumerate(_scanned) for index in range(len(inner))]
    with ProcessPoolExecutor(workers, mp_context=get_context('fork')) as pool:
        yield from pool.map(_look, places, chunksize=16)


def _look(place: tuple[int, int]) -> tuple[str, str, str]:
    part, index = place
    return check_sample(_scanned[part], index)


class BadSampleList:
    """A file of skipped samples, a line of JSON each, written to by all workers and ranks.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._size, self._files = -1, set()

    def add(self, file: str, reason: str) -> None:
        """Appends a sample."""
        line = json.dumps(dict(file=file, reason=reason)) + '\n'
        # One write of a line: those of several processes do not mix.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b'\n':
                line = '\n' + line  # a process died while it wrote
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def count(self) -> int:
        """Number of different files in it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._size:
            self._size = size
            lines = self.path.read_text(errors='replace').splitlines() if size else []
            self._files = set(filter(None, map(_file_of, lines)))
        return len(self._files)


def _file_of(line: str) -> str | None:
    """The file that a line of the list names; None if it was not written to its end."""
    try:
        return json.loads(line)['file']
    except (ValueError, LookupError, TypeError):
        return None
