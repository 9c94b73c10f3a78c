"""The miniatures are read by the stock dataset classes, and hold what those expect."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

import mmslak  # noqa: F401
from tests import miniatures
from tests.golden import ROOT


def build(scope: str, **dataset):
    init_default_scope(scope)
    return DATASETS.build(dict(pipeline=[], **dataset))


def size(path: str) -> tuple[int, int]:
    """Height and width of a picture as stock pipelines load it, in colour of 8 bits."""
    image = LoadImageFromFile()(dict(img_path=path))['img']
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    return image.shape[:2]


@pytest.mark.parametrize(
    ('form', 'mode', 'format_', 'depth'),
    [
        ('plain', 'RGB', 'JPEG', 8),
        ('grey', 'L', 'JPEG', 8),
        ('cmyk', 'CMYK', 'JPEG', 8),
        ('exif', 'RGB', 'JPEG', 8),
        ('png', 'RGB', 'PNG', 8),
        ('palette', 'P', 'PNG', 8),
        ('alpha', 'RGBA', 'PNG', 8),
        ('deep', 'RGB', 'PNG', 16),
        ('deep grey', 'I;16', 'PNG', 16),
    ],
)
def test_forms_of_pictures(tmp_path, form, mode, format_, depth):
    path = tmp_path / 'a.jpg'
    miniatures.write_picture(path, np.random.default_rng(0), miniatures.Kind((30, 50), form))
    with Image.open(path) as picture:
        assert picture.format == format_
        assert picture.mode == mode
        assert picture.size == ((30, 50) if form == 'exif' else (50, 30))
        assert picture.getexif().get(miniatures.ORIENTATION) == (6 if form == 'exif' else None)
    if format_ == 'PNG':
        assert path.read_bytes()[24] == depth
    assert size(str(path)) == (30, 50)  # the loader turns by EXIF's orientation


def test_an_orientation_turns_the_picture_clockwise(tmp_path):
    noise = [np.random.default_rng(0) for _ in range(2)]
    for form, rng in zip(('plain', 'exif'), noise):
        kind = miniatures.Kind((48, 64), form)
        miniatures.write_picture(tmp_path / f'{form}.jpg', rng, kind)
    plain, turned = (
        LoadImageFromFile()(dict(img_path=str(tmp_path / f'{form}.jpg')))['img'].astype(float)
        for form in ('plain', 'exif')
    )
    # The same picture but for what JPEG loses.
    assert np.abs(plain - turned).mean() < np.abs(plain - turned[::-1, ::-1]).mean() / 2


def forms_of(paths: list[Path]) -> set[str]:
    found = set()
    for path in paths:
        with Image.open(path) as picture:
            turned = miniatures.ORIENTATION in picture.getexif()
            found.add('exif' if turned else picture.mode)
    return found


def test_ade20k(tmp_path):
    dataset = build(
        'mmseg',
        type='ADE20KDataset',
        data_root=str(miniatures.write_ade20k(tmp_path, train=6)),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    )
    assert len(dataset) == 6
    init_default_scope('mmseg')
    from mmseg.datasets.transforms import LoadAnnotations

    for i, sample in enumerate(dataset):
        labels = LoadAnnotations()(sample)['gt_seg_map']
        assert labels.shape == size(sample['img_path'])
        assert labels.max() == 255  # what was 0
        if i == 5:
            assert labels.min() == 255  # nothing of the 150 classes
        else:
            assert labels[-1, -1] == 149  # the last of 150 classes once zero is taken off
    pictures = sorted(tmp_path.glob('images/training/*'))
    assert forms_of(pictures) == {'RGB', 'L', 'CMYK', 'exif'}  # a JPEG can have no others
    assert {path.suffix for path in pictures} == {'.jpg'}


def voc(root: Path, year: int, split: str, **more):
    return build(
        'mmdet',
        type='VOCDataset',
        data_root=str(root),
        ann_file=f'VOC{year}/ImageSets/Main/{split}.txt',
        data_prefix=dict(sub_data_root=f'VOC{year}/'),
        **more,
    )


@pytest.mark.parametrize(('year', 'split', 'count'), [(2007, 'test', 3), (2012, 'trainval', 6)])
def test_voc_of_one_size(tmp_path, year, split, count):
    miniatures.write_voc(tmp_path, 2007, size=(96, 128))
    miniatures.write_voc(tmp_path, 2012, size=(96, 128))
    filters = dict(filter_empty_gt=True, min_size=32, bbox_min_size=32)
    dataset = voc(tmp_path, year, split, filter_cfg=filters)
    assert len(dataset) == count
    for sample in dataset:
        assert len(sample['instances']) == 2
        for instance in sample['instances']:
            left, top, right, bottom = instance['bbox']
            assert 0 <= left < right < 128
            assert 0 <= top < bottom < 96


def test_voc(tmp_path):
    dataset = voc(miniatures.write_voc(tmp_path), 2007, 'trainval')
    assert len(dataset) == 6
    empty = 0
    for sample in dataset:
        height, width = size(sample['img_path'])
        assert (sample['height'], sample['width']) == (height, width)
        if not sample['instances']:
            empty += 1
            continue
        boxes = np.array([instance['bbox'] for instance in sample['instances']])
        sides = (boxes[:, 2:] - boxes[:, :2]).min(1)
        assert len(boxes) == 7
        assert (boxes[:, 2] >= width).sum() == (boxes[:, 3] >= height).sum() == 1
        assert sides.min() == 1  # VOCDataset has whole pixels
        assert (sides < 32).sum() >= 2
        assert [instance['ignore_flag'] for instance in sample['instances']] == [0] * 4 + [1, 0, 0]
    assert empty == 1
    text = ''.join(path.read_text() for path in (tmp_path / 'VOC2007/Annotations').iterdir())
    tree = ElementTree.fromstring(f'<all>{text}</all>')
    things = tree.findall('.//object')
    assert len(tree.findall('.//part')) == 7
    assert sum(thing.find('difficult') is None for thing in things) == 7
    assert '<xmin>5.70</xmin>' in text
    pictures = sorted((tmp_path / 'VOC2007/JPEGImages').iterdir())
    assert forms_of(pictures) == {'RGB', 'L', 'CMYK', 'exif'}


def test_voc_label_maps_have_a_palette(tmp_path):
    base = miniatures.write_voc(tmp_path, 2012) / 'VOC2012'
    dataset = build(
        'mmseg',
        type='PascalVOCDataset',
        data_root=str(base),
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file='ImageSets/Segmentation/trainval.txt',
    )
    assert len(dataset) == 6
    from mmseg.datasets.transforms import LoadAnnotations

    found = set()
    for sample in dataset:
        with Image.open(sample['seg_map_path']) as picture:
            assert picture.mode == 'P'
        labels = LoadAnnotations()(sample)['gt_seg_map']
        assert labels.shape == size(sample['img_path'])
        found |= set(np.unique(labels))
    assert found == {0, 14, 15, 255}  # indices, not the palette's colours


def test_voc_2012_has_no_test_set(tmp_path):
    miniatures.write_voc(tmp_path, 2012)
    names = {path.name for path in (tmp_path / 'VOC2012/ImageSets/Main').iterdir()}
    assert names == {'train.txt', 'val.txt', 'trainval.txt'}


def coco(root: Path, split: str, **more):
    return build(
        'mmdet',
        type='CocoDataset',
        data_root=str(root),
        ann_file=f'annotations/instances_{split}2017.json',
        data_prefix=dict(img=f'{split}2017/'),
        **more,
    )


def test_coco_of_one_size(tmp_path):
    root = miniatures.write_coco(tmp_path, size=(96, 128))
    dataset = coco(root, 'train', filter_cfg=dict(filter_empty_gt=True, min_size=32))
    assert len(dataset) == 4
    instances = [instance for sample in dataset for instance in sample['instances']]
    assert len(instances) == 8
    # person, dog and toothbrush among the 80 classes without COCO's gaps
    assert {instance['bbox_label'] for instance in instances} <= {0, 16, 79}
    assert all(len(instance['mask'][0]) == 8 for instance in instances)


def test_coco(tmp_path):
    from mmdet.datasets.transforms import LoadAnnotations

    root = miniatures.write_coco(tmp_path, train=9, val=6)
    load = LoadAnnotations(with_bbox=True, with_mask=True)
    for split, count in (('train', 9), ('val', 6)):
        dataset = coco(root, split, test_mode=True)
        assert len(dataset) == count
        empty = 0
        for sample in dataset:
            height, width = size(sample['img_path'])
            assert (sample['height'], sample['width']) == (height, width)
            if not sample['instances']:
                empty += 1
                continue
            assert len(sample['instances']) == 5  # CocoDataset leaves the one below a pixel out
            assert [instance['ignore_flag'] for instance in sample['instances']] == [0] * 4 + [1]
            sample = load(LoadImageFromFile()(dict(sample)))
            assert sample['gt_masks'].masks.shape == (5, height, width)
            crowd = sample['gt_masks'].masks[-1]
            assert crowd[:, : width // 3].all()
            assert not crowd[:, width // 3 :].any()
            boxes = sample['gt_bboxes'].tensor.numpy()
            assert (boxes[:, 2] > width).sum() == (boxes[:, 3] > height).sum() == 1
            assert ((boxes[:, 2:] - boxes[:, :2]).min(1) < 32).any()
        assert empty == 1
        assert len(coco(root, split, filter_cfg=dict(filter_empty_gt=True))) == count - 1
    assert forms_of(sorted((root / 'train2017').iterdir())) == {
        'RGB', 'L', 'CMYK', 'exif', 'RGBA', 'P', 'I;16',
    }  # fmt: skip
    for path in root.glob('*2017/*'):
        with Image.open(path) as picture:
            assert picture.format == {'.jpg': 'JPEG', '.png': 'PNG'}[path.suffix]


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
    pictures = sorted((tmp_path / 'val').rglob('*.JPEG'))
    assert forms_of(pictures) == {'RGB', 'L', 'CMYK', 'exif'}
    assert sum(path.read_bytes().startswith(b'\x89PNG') for path in pictures) == 1
    for path in pictures:
        size(str(path))


# ---------------------------------------------------------------- VOC's small boxes


def things_of(root: Path, years: tuple[int, ...]) -> list[bool]:
    """Of every object of the training sets, whether it is difficult."""
    found = []
    for year in years:
        base = root / f'VOC{year}'
        for name in (base / 'ImageSets/Main/trainval.txt').read_text().split():
            for thing in ElementTree.parse(base / f'Annotations/{name}.xml').findall('object'):
                found.append(thing.findtext('difficult') == '1')
    return found


@pytest.mark.parametrize(
    ('name', 'years'),
    [
        ('faster_rcnn_slak_t_voc07', (2007,)),
        ('faster_rcnn_slak_t_voc0712', (2007, 2012)),
        ('faster_rcnn_convnext_t_voc07', (2007,)),
        ('demo/faster_rcnn_slak_digit_scenes', (2007,)),
    ],
)
def test_small_boxes_of_voc_are_learnt(tmp_path, name, years):
    """MMDetection 3's base ignores those below 32 pixels."""
    for year in years:
        miniatures.write_voc(tmp_path, year)
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope('mmdet')
    dataset = cfg.train_dataloader.dataset
    for part in dataset.get('datasets', [dataset]):
        part.data_root = str(tmp_path)
        part.pipeline = [step for step in part.pipeline if 'Resize' not in step.type]
        part.pop('metainfo', None)  # the demo's classes are digits
    samples = [sample['data_samples'] for sample in DATASETS.build(dataset)]
    difficult = things_of(tmp_path, years)
    learnt = sum(len(sample.gt_instances) for sample in samples)
    ignored = sum(len(sample.ignored_instances) for sample in samples)
    assert (learnt, ignored) == (difficult.count(False), difficult.count(True))
    boxes = np.concatenate([sample.gt_instances.bboxes.numpy() for sample in samples])
    assert ((boxes[:, 2:] - boxes[:, :2]).min(1) < 32).sum() >= 2 * learnt / 6
