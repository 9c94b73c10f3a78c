"""The miniatures are read by the stock dataset classes, and hold what those expect."""

import pytest
from mmengine.registry import DATASETS, init_default_scope

import mmslak  # noqa: F401
from tests import miniatures


def build(scope: str, **dataset):
    init_default_scope(scope)
    return DATASETS.build(dict(pipeline=[], **dataset))


def test_ade20k(tmp_path):
    dataset = build(
        'mmseg',
        type='ADE20KDataset',
        data_root=str(miniatures.write_ade20k(tmp_path)),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    )
    assert len(dataset) == 4
    init_default_scope('mmseg')
    from mmseg.datasets.transforms import LoadAnnotations

    labels = LoadAnnotations()(dataset[0])['gt_seg_map']
    assert labels.shape == (64, 80)
    assert labels[-1, -1] == 149  # the last of 150 classes once zero is taken off
    assert labels.max() == 255  # what was 0


@pytest.mark.parametrize(('year', 'split', 'count'), [(2007, 'test', 3), (2012, 'trainval', 6)])
def test_voc(tmp_path, year, split, count):
    miniatures.write_voc(tmp_path, 2007)
    miniatures.write_voc(tmp_path, 2012)
    dataset = build(
        'mmdet',
        type='VOCDataset',
        data_root=str(tmp_path),
        ann_file=f'VOC{year}/ImageSets/Main/{split}.txt',
        data_prefix=dict(sub_data_root=f'VOC{year}/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=32),
    )
    assert len(dataset) == count
    for sample in dataset:
        assert len(sample['instances']) == 2
        for instance in sample['instances']:
            left, top, right, bottom = instance['bbox']
            assert 0 <= left < right < 128
            assert 0 <= top < bottom < 96


def test_voc_2012_has_no_test_set(tmp_path):
    miniatures.write_voc(tmp_path, 2012)
    names = {path.name for path in (tmp_path / 'VOC2012/ImageSets/Main').iterdir()}
    assert names == {'train.txt', 'val.txt', 'trainval.txt'}


def test_coco(tmp_path):
    dataset = build(
        'mmdet',
        type='CocoDataset',
        data_root=str(miniatures.write_coco(tmp_path)),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    )
    assert len(dataset) == 4
    instances = [instance for sample in dataset for instance in sample['instances']]
    assert len(instances) == 8
    # person, dog and toothbrush among the 80 classes without COCO's gaps
    assert {instance['bbox_label'] for instance in instances} <= {0, 16, 79}
    assert all(len(instance['mask'][0]) == 8 for instance in instances)


def test_imagenet(tmp_path):
    dataset = build(
        'mmpretrain',
        type='ImageNet',
        data_root=str(miniatures.write_imagenet(tmp_path)),
        split='val',
    )
    assert len(dataset) == 9
    assert len(dataset.CLASSES) == 1000
    assert sorted({dataset.get_data_info(i)['gt_label'] for i in range(9)}) == [0, 1, 2]
