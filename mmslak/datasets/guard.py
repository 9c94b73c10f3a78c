"""Puts the checks of samples into the pipelines of datasets."""

from collections.abc import Callable, Iterable, Iterator

from mmslak.datasets.samples import (
    BadSampleError,
    check_boxes,
    check_file,
    check_label_map,
    check_picture,
    check_stated_size,
)

DECODERS = ('cv2', 'pillow', None)  # of transforms that load what check_picture can judge
LABEL_MAPS = ('gt_seg_map', 'gt_depth_map')


class GuardedPipeline:
    """A dataset's pipeline that checks what its loading transforms load, at any depth.

    Args:
        pipeline: The dataset's Compose, whose loading transforms are replaced in place.
        classes: Number of classes of label maps; None leaves values unchecked.
        ignored: Value of pixels without a class.
        on_bad: Called with file and reason of a bad sample, and whether it can be loaded. It raises
            an error, or returns False to leave the sample out (MMEngine's datasets then draw
            another one), or returns True to load it nevertheless.
        on_odd: Called with file and reason of an odd sample, which is loaded.
    """

    def __init__(
        self,
        pipeline: Callable,
        classes: int | None,
        ignored: int,
        on_bad: Callable[[str, str, bool], bool],
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
        """Runs a check and reports what it finds.

        An error of the check itself is reported as odd.
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

    def bad(self, error: BadSampleError, loads: bool = True) -> None:
        """Reports a bad sample, and leaves it out unless it loads and `on_bad` returns True."""
        file, _, reason = str(error).partition(': ')
        if not self.on_bad(file, reason, loads) or not loads:
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
        self._check_files(data)
        before = dict(data)
        try:
            loaded = self.transform(data)
        except Exception as error:  # decoders raise what they like
            path = (data.get('seg_map_path') if 'img' in data else None) or _path(data)
            bad = BadSampleError(f'{path}: {_why(error, self.transform)}')
            self._guard.bad(bad, loads=False)
        if isinstance(loaded, dict):
            # Older values may have been resized since then, unless the picture comes last.
            old = before if 'img' in before else {}
            new = {k for k, v in loaded.items() if v is not None and v is not old.get(k)}
            self._check_loaded(loaded, new)
        return loaded

    def _check_files(self, data: dict) -> None:
        if reads_pictures(self.transform):
            file, options = data.get('img_path'), (is_colour(self.transform), turns(self.transform))
            self._guard.judge(check_picture, file, file, *options)
        elif reads_labels(self.transform):
            file = data.get('seg_map_path')
            self._guard.judge(check_file, file, file)

    def _check_loaded(self, data: dict, new: set[str]) -> None:
        guard, path = self._guard, _path(data)
        if 'img' in new:
            guard.judge(check_stated_size, path, data, turns(self.transform))
        for name in [name for name in LABEL_MAPS if name in new]:
            where = data.get('seg_map_path', path)
            classes = guard.classes if name == 'gt_seg_map' else None
            guard.judge(check_label_map, where, data, name, classes, guard.ignored)
        if 'gt_bboxes' in new:
            guard.judge(check_boxes, path, data)


def _path(data: dict) -> object:
    return data.get('img_path', data.get('img_id', 'a sample'))


def _why(error: Exception, transform: object) -> str:
    if isinstance(error, KeyError) and error.args == ('mask',):
        return (
            "an annotation without 'segmentation', of which masks are made: a config that trains "
            f'masks needs it; without with_mask=True of {type(transform).__name__} and without a '
            'mask head, as in Faster R-CNN, boxes are enough'
        )
    return f'cannot be read ({type(error).__name__}: {error})'


def guard(
    dataset: object, on_bad: Callable[[str, str, bool], bool], on_odd: Callable[[str, str], None]
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
            inner.pipeline = GuardedPipeline(pipeline, *labels_of(inner), on_bad, on_odd)
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
    """(list, index in it) of the loading transforms of a pipeline.

    It finds those inside of other transforms, too: test-time augmentation, choices, branches.
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


def labels_of(dataset: object) -> tuple[int | None, int]:
    """(number of classes, value of pixels without a class) of a dataset's label maps.

    The number is None for detection datasets, whose stuff maps have other classes than the boxes.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    known = isinstance(classes, (list, tuple)) and hasattr(dataset, 'ignore_index')
    return len(classes) if known else None, getattr(dataset, 'ignore_index', 255)


# ---------------------------------------------------------------- what a transform reads


def reads_pictures(transform: object) -> bool:
    """Whether a transform loads a picture from the disk that Pillow can open before."""
    skips = getattr(transform, 'ignore_empty', False)  # skips unreadable pictures by itself
    return type(transform).__name__ == 'LoadImageFromFile' and _decodes(transform) and not skips


def reads_labels(transform: object) -> bool:
    """Whether a transform loads a label map that is such a picture."""
    names = 'LoadAnnotations', 'LoadPanopticAnnotations'
    wanted = getattr(transform, 'with_seg', True)
    return type(transform).__name__ in names and wanted and _decodes(transform)


def is_colour(transform: object) -> bool:
    """Whether a transform turns every picture into colour of 8 bits."""
    return _color_type(transform).startswith('color')


def turns(transform: object) -> bool:
    """Whether a transform turns pictures as their EXIF orientation says."""
    kind = _color_type(transform)
    return _decodes(transform) and kind != 'unchanged' and not kind.endswith('ignore_orientation')


def _color_type(transform: object) -> str:
    return str(getattr(transform, 'color_type', 'color'))


def _decodes(transform: object) -> bool:
    storage = getattr(transform, 'backend_args', None) or {}
    storage = storage or getattr(transform, 'file_client_args', None) or {}
    on_disk = storage.get('backend', 'local') in ('local', 'disk')
    return on_disk and getattr(transform, 'imdecode_backend', None) in DECODERS
