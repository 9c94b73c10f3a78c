"""Samples of a dataset, each as its pipeline loads it."""

from types import SimpleNamespace

import pytest
from mmcv.transforms import Compose, LoadImageFromFile, TestTimeAug

from mmslak.datasets.scan import check_sample, sample_at
from tests.datasets.test_samples import CONTENT, LABELS, Dataset, LoadProposals, Shrink, save


def test_a_sample_of_a_dataset_is_checked_without_its_augmentation(tmp_path):
    path = save(tmp_path / 'x.jpg')
    views = TestTimeAug([[Shrink(), LoadProposals()], [LABELS]])
    dataset = Dataset(
        pipeline=Compose([LoadImageFromFile(), views]),
        metainfo={},
        get_data_info=lambda index: dict(
            img_path=str(path), seg_map_path=str(save(tmp_path / 'x.png', CONTENT))
        ),
    )
    file, reason, odd, files = check_sample(dataset, 0)
    assert file.endswith('x.png')
    assert reason.startswith('a label map of 80×64×3, 80×64, the size of its picture, expected')
    assert odd == []
    assert files == (str(path), str(tmp_path / 'x.png'))


def test_places_are_those_of_the_scan():
    """Numbers go through the datasets inside of wrappers."""
    parts = [
        Dataset(pipeline=None, get_data_info=lambda i, n=n: f'{n}{i}', length=length)
        for n, length in (('a', 2), ('b', 0), ('c', 1))
    ]
    whole = SimpleNamespace(datasets=parts)
    assert [sample_at(whole, place) for place in range(3)] == ['a0', 'a1', 'c0']
    with pytest.raises(IndexError):
        sample_at(whole, 3)
