"""Checks all samples of a dataset."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from mmslak.datasets.guard import GuardedPipeline, bare, innermost, labels_of, loading_transforms


def check_sample(dataset: object, index: int) -> tuple[str, str, list[str]]:
    """Loads a sample of a dataset as its pipeline does, without augmentation.

    Args:
        dataset: One with get_data_info and a pipeline, such as `innermost` gives.
        index: Number of the sample.

    Returns:
        (file, why it is bad or '', why it is odd)
    """
    bad, odd = [], []
    pipeline = getattr(dataset.pipeline, 'pipeline', dataset.pipeline)
    # Several views may have the same loading transform.
    loading = {repr(bare(ts[i])): bare(ts[i]) for ts, i in loading_transforms(pipeline)}
    guarded = GuardedPipeline(
        _Transforms(list(loading.values())),
        *labels_of(dataset),
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


_scanned: list = []  # datasets, for the processes that are forked from this one


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
