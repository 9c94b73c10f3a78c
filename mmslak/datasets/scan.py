"""Checks all samples of a dataset."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from mmengine.dataset import Compose

from mmslak.datasets.guard import GuardedPipeline, bare, innermost, labels_of, loading_transforms


class Looked(NamedTuple):
    """What was found in a sample.

    Attributes:
        file: Its picture, or the file for which it is bad.
        reason: Why it is bad, or ''.
        odd: Why it is odd.
        files: See `files_of`.
    """

    file: str
    reason: str
    odd: list[str]
    files: tuple[str, ...]


def check_sample(dataset: object, index: int) -> Looked:
    """Loads a sample of a dataset as its pipeline does, without augmentation.

    Args:
        dataset: One with get_data_info and a pipeline, such as `innermost` gives.
        index: Number of the sample.
    """
    bad, odd = [], []
    pipeline = getattr(dataset.pipeline, 'pipeline', dataset.pipeline)
    # Several views may have the same loading transform.
    loading = {repr(bare(ts[i])): bare(ts[i]) for ts, i in loading_transforms(pipeline)}
    guarded = GuardedPipeline(
        Compose(list(loading.values())),
        *labels_of(dataset),
        lambda file, reason, loads: bad.append((file, reason)),
        lambda file, reason: odd.append(reason),
    )
    data = dataset.get_data_info(index)
    path = data.get('img_path', f'sample {index}')
    files = files_of(data)
    guarded(data)
    return Looked(*bad[0], odd, files) if bad else Looked(path, '', odd, files)


def files_of(sample: dict) -> tuple[str, ...]:
    """The picture and the label map of a sample, as far as it has them."""
    paths = (sample.get(key) for key in ('img_path', 'seg_map_path'))
    return tuple(path for path in paths if isinstance(path, str))


def sample_at(dataset: object, place: int) -> dict:
    """What a dataset knows of the sample that `scan` yields in this place, from 0."""
    for inner in innermost(dataset):
        if place < len(inner):
            return inner.get_data_info(place)
        place -= len(inner)
    raise IndexError(f'no sample in place {place}')


_scanned: list = []  # datasets, for the processes that are forked from this one


def scan(dataset: object, workers: int | None = None) -> Iterator[Looked]:
    """`check_sample` of all samples of the datasets inside of wrappers, in order.

    Args:
        dataset: A dataset of mmseg, mmdet or mmpretrain.
        workers: Processes; None is one per core.
    """
    _scanned[:] = innermost(dataset)
    places = [(part, index) for part, inner in enumerate(_scanned) for index in range(len(inner))]
    with ProcessPoolExecutor(workers, mp_context=get_context('fork')) as pool:
        yield from pool.map(_look, places, chunksize=16)


def _look(place: tuple[int, int]) -> Looked:
    part, index = place
    return check_sample(_scanned[part], index)
