"""The digit scenes: determinism, the split, and the four formats as the stock classes read them."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmslak.datasets import CLASSES, SEG_CLASSES, SEG_PALETTE, make_digit_scenes
from mmslak.datasets.digit_scenes import PHOTOGRAPHS, load_source, polygons, tree_digest
from tests import forks

SMALL = dict(train=6, test=4, size=96, train_digits=30, test_digits=20)


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('digit_scenes') / 'out'
    assert make_digit_scenes(out, **SMALL)
    return out


def coco_of(root: Path, split: str) -> dict:
    return json.loads((root / f'coco/annotations/instances_{split}2017.json').read_text())


def test_same_seed_same_bytes(root, tmp_path):
    make_digit_scenes(tmp_path / 'same', **SMALL)
    make_digit_scenes(tmp_path / 'other', seed=1, **SMALL)
    assert tree_digest(tmp_path / 'same') == tree_digest(root)
    assert tree_digest(tmp_path / 'other') != tree_digest(root)


def sizes(folder: Path) -> list[tuple[int, int]]:
    """Height and width of all pictures below a folder."""
    return [Image.open(path).size[::-1] for path in sorted(folder.rglob('*.[jp][pn]g'))]


def test_pictures_differ_in_size_and_aspect(tmp_path):
    """Some are larger and some smaller than the size asked for, which the demos resize to."""
    numbers = dict(train=30, test=1, train_digits=30, test_digits=10)
    make_digit_scenes(tmp_path / 'out', size=160, **numbers)
    for tree, side, aspect in (('ade/images', 160, 0.6), ('cls', 64, 0.8)):
        found = np.array(sizes(tmp_path / 'out' / tree))
        longer, shorter = found.max(1), found.min(1)
        assert 0.75 * side - 1 <= longer.min() < 0.85 * side
        assert 1.15 * side < longer.max() <= 1.25 * side + 1
        ratio = shorter / longer
        assert aspect - 0.02 < ratio.min() < aspect + 0.1
        assert ratio.max() > 0.9
        upright = (found[:, 0] > found[:, 1]).mean()
        assert 0.25 < upright < 0.75
        assert len(set(map(tuple, found.tolist()))) > 25


def test_split_shares_no_digit_and_no_photograph():
    train, test = load_source('train'), load_source('test')
    assert len(train.samples) + len(test.samples) == 1797
    assert not set(train.samples) & set(test.samples)
    seen = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in seen for digit in test.digits)
    assert not set(PHOTOGRAPHS['train']) & set(PHOTOGRAPHS['test'])
    # Both splits know every class about equally often.
    for source in (train, test):
        shares = np.bincount(source.labels, minlength=10) / len(source.labels)
        assert shares.min() > 0.09


def test_written_files_hold_no_test_digit_in_training(root):
    allowed = {split: set(load_source(split).samples.tolist()) for split in ('train', 'test')}
    for folder, split in (('train', 'train'), ('val', 'test')):
        names = [path.name for path in (root / 'cls' / folder).rglob('*.png')]
        assert {int(re.search(r'sample(\d+)', name)[1]) for name in names} <= allowed[split]
        annotations = coco_of(root, folder)['annotations']
        assert {annotation['digit_sample'] for annotation in annotations} <= allowed[split]


def test_label_images_boxes_and_polygons_agree(root):
    for ade, split in (('training', 'train'), ('validation', 'val')):
        coco = coco_of(root, split)
        labels = sorted((root / f'ade/annotations/{ade}').iterdir())
        for entry, label_file in zip(coco['images'], labels, strict=True):
            label = np.asarray(Image.open(label_file))
            assert label.shape == (entry['height'], entry['width'])
            picture = root / f'ade/images/{ade}/{label_file.stem}.jpg'
            assert Image.open(picture).size == (entry['width'], entry['height'])
            assert label.dtype == np.uint8
            assert label.min() == 1  # 0, ADE20K's 'unlabelled', is not used
            instances = [a for a in coco['annotations'] if a['image_id'] == entry['id']]
            assert 1 <= len(instances) <= 4
            assert set(np.unique(label)) == {1} | {a['category_id'] + 1 for a in instances}
            covered = np.zeros(label.shape, dtype=bool)
            for instance in instances:
                x, y, w, h = instance['bbox']
                assert min(x, y) >= 0
                assert x + w <= entry['width']
                assert y + h <= entry['height']
                inside = label[y : y + h, x : x + w] == instance['category_id'] + 1
                # The box is tight, and the polygons span it exactly.
                assert inside[0].any()
                assert inside[-1].any()
                assert inside[:, 0].any()
                assert inside[:, -1].any()
                points = np.concatenate([np.reshape(p, (-1, 2)) for p in instance['segmentation']])
                assert points.min(0).tolist() == [x, y]
                assert points.max(0).tolist() == [x + w, y + h]
                assert inside.sum() * 0.95 <= instance['area'] <= w * h
                covered[y : y + h, x : x + w] |= inside
            assert (covered == (label > 1)).all()


def test_digits_are_bright_on_dim_backgrounds(root):
    image_file = sorted((root / 'ade/images/training').iterdir())[0]
    label_file = sorted((root / 'ade/annotations/training').iterdir())[0]
    brightness = np.asarray(Image.open(image_file).convert('L'), dtype=float)
    digit = np.asarray(Image.open(label_file)) > 1
    assert brightness[digit].mean() > brightness[~digit].mean() + 60


def test_polygon_of_a_single_pixel_and_of_a_ring():
    mask = np.zeros((5, 5), dtype=bool)
    mask[1, 3] = True
    (outline,) = polygons(mask)
    points = np.reshape(outline, (-1, 2))
    assert points.min(0).tolist() == [3, 1]
    assert points.max(0).tolist() == [4, 2]
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    assert len(polygons(ring)) == 1


def test_mmpretrain_reads_the_image_folders(root):
    pretrain = pytest.importorskip('mmpretrain.datasets')
    for split, count in (('train', 30), ('val', 20)):
        dataset = pretrain.CustomDataset(data_root=str(root / 'cls'), data_prefix=split)
        assert len(dataset) == count
        assert tuple(dataset.CLASSES) == CLASSES
        assert all(f'/{CLASSES[info["gt_label"]]}/' in info['img_path'] for info in dataset)
    assert 28 <= max(Image.open(dataset[0]['img_path']).size) <= 48


def test_mmseg_reads_the_ade_tree(root):
    seg = pytest.importorskip('mmseg.datasets')
    from mmseg.datasets.transforms import LoadAnnotations

    for split, count in (('training', 6), ('validation', 4)):
        prefix = dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}')
        where = dict(data_root=str(root / 'ade'), data_prefix=prefix)
        own = seg.BaseSegDataset(
            metainfo=dict(classes=SEG_CLASSES, palette=SEG_PALETTE), reduce_zero_label=True, **where
        )
        # ADE20KDataset takes no class names but ADE20K's, and finds the same files and labels.
        ade = seg.ADE20KDataset(**where)
        assert len(own) == len(ade) == count
        assert own.metainfo['classes'] == SEG_CLASSES
        for info, ade_info in zip(own, ade, strict=True):
            assert {k: info[k] for k in ('img_path', 'seg_map_path', 'reduce_zero_label')} == {
                k: ade_info[k] for k in ('img_path', 'seg_map_path', 'reduce_zero_label')
            }
            raw = np.asarray(Image.open(info['seg_map_path']))
            labels = LoadAnnotations(reduce_zero_label=True)(dict(info))['gt_seg_map']
            assert (labels == raw - 1).all()
            assert labels.max() < len(SEG_CLASSES)


def test_mmdet_reads_the_voc_devkit(root):
    det = pytest.importorskip('mmdet.datasets')
    folder = root / 'voc/VOCdevkit'
    for name, split, count in (('trainval', 'train', 6), ('test', 'val', 4)):
        dataset = det.VOCDataset(
            data_root=str(folder),
            ann_file=f'VOC2007/ImageSets/Main/{name}.txt',
            data_prefix=dict(sub_data_root='VOC2007/'),
            metainfo=dict(classes=CLASSES),
            pipeline=[],
        )
        assert len(dataset) == count
        assert dataset.metainfo['dataset_type'] == 'VOC2007'
        coco = coco_of(root, split)
        for info, entry in zip(dataset, coco['images'], strict=True):
            assert int(info['img_id']) == entry['id']
            assert Image.open(info['img_path']).size == (info['width'], info['height'])
            assert (info['width'], info['height']) == (entry['width'], entry['height'])
            expected = [a for a in coco['annotations'] if a['image_id'] == entry['id']]
            assert len(info['instances']) == len(expected)
            for instance, annotation in zip(info['instances'], expected, strict=True):
                x, y, w, h = annotation['bbox']
                # VOC's last pixel is part of the box; mmdet only takes the one-based start away.
                assert list(instance['bbox']) == [x, y, x + w - 1, y + h - 1]
                assert instance['bbox_label'] == annotation['category_id'] - 1
                assert not instance['ignore_flag']


def test_mmdet_reads_the_coco_tree(root):
    det = pytest.importorskip('mmdet.datasets')
    from pycocotools.coco import COCO

    for split, count in (('train', 6), ('val', 4)):
        annotation_file = root / f'coco/annotations/instances_{split}2017.json'
        dataset = det.CocoDataset(
            data_root=str(root / 'coco'),
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'),
            metainfo=dict(classes=CLASSES),
            pipeline=[],
        )
        assert len(dataset) == count
        labels = Counter(i['bbox_label'] for info in dataset for i in info['instances'])
        expected = Counter(a['category_id'] - 1 for a in coco_of(root, split)['annotations'])
        assert labels == expected
        for info in dataset:
            assert Image.open(info['img_path']).size == (info['width'], info['height'])

        # COCO's own rasterizer gives back the pixels of the label image, holes filled.
        from scipy.ndimage import binary_fill_holes

        coco = COCO(str(annotation_file))
        ade = sorted(
            (root / 'ade/annotations')
            .joinpath('training' if split == 'train' else 'validation')
            .iterdir()
        )
        for image_id, label_file in zip(coco.getImgIds(), ade, strict=True):
            label = np.asarray(Image.open(label_file))
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
                x, y, w, h = annotation['bbox']
                mask = np.zeros(label.shape, dtype=bool)
                box = np.s_[y : y + h, x : x + w]
                mask[box] = label[box] == annotation['category_id'] + 1
                mask = binary_fill_holes(mask)
                drawn = coco.annToMask(annotation).astype(bool)
                assert (mask & drawn).sum() >= 0.9 * (mask | drawn).sum()


def test_the_same_call_keeps_and_other_options_rebuild(tmp_path):
    out = tmp_path / 'deep' / 'out'
    tiny = dict(train=1, test=1, size=80, train_digits=10, test_digits=10)
    assert make_digit_scenes(out, **tiny)
    before = (out / 'digit_scenes.json').stat().st_mtime_ns
    assert not make_digit_scenes(out, **tiny)
    assert (out / 'digit_scenes.json').stat().st_mtime_ns == before
    assert make_digit_scenes(out, **{**tiny, 'train': 2})
    assert len(list((out / 'ade/images/training').iterdir())) == 2
    assert [path.name for path in out.parent.iterdir()] == ['out']


@pytest.mark.parametrize('what', ['else', 'added', 'edited', 'file', 'broken'])
def test_nothing_of_the_users_is_touched(tmp_path, what):
    out = tmp_path / 'out'
    tiny = dict(train=1, test=1, size=80, train_digits=10, test_digits=10)
    if what == 'file':
        out.write_text('mine')
    else:
        out.mkdir()
        if what in ('added', 'edited'):
            make_digit_scenes(out, **tiny)
        name = dict(edited='coco/annotations/instances_val2017.json', broken='digit_scenes.json')
        (out / name.get(what, 'mine.txt')).write_text('mine')
    before = tree_digest(tmp_path)
    reason = dict(added='was changed', edited='was changed', file='is a file')
    with pytest.raises(FileExistsError, match=reason.get(what, 'holds something else')):
        make_digit_scenes(out, **{**tiny, 'train': 2})
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize(
    'bad', [dict(size=32), dict(size=512), dict(seed=-1), dict(train=0), dict(test_digits=9)]
)
def test_numbers_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match=r'size|seed'):
        make_digit_scenes(tmp_path / 'out', **bad)
    assert not list(tmp_path.iterdir())


def test_tool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tool = Path(__file__).parents[2] / 'tools/make_digit_scenes.py'
    numbers = ['--train=1', '--test=1', '--train-digits=10', '--test-digits=10', '--size=80']

    def call(*options: str) -> forks.Ended:
        return forks.run(forks.program, str(tool), '--out', 'scenes', *options)

    done = call(*numbers)
    assert done.statuses == [0], done.output
    assert 'scenes/voc/VOCdevkit' in done.output
    assert (tmp_path / 'scenes/voc/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt').is_file()
    assert 'already there' in call(*numbers).output

    refused = call('--size', '8')
    assert refused.statuses == [2]
    assert refused.output.splitlines() == ['error: size must be 80 to 256 pixels, got 8']
