"""`mmslak train` says what the data lack before the first iteration, and at the end again."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmslak import errors
from mmslak.cli import census, runner
from mmslak.cli.census import census_of_config, sentence, text_of
from mmslak.cli.config_checks import build_dataset, check_datasets
from mmslak.cli.train import main
from mmslak.datasets.census import Census, Row, joined
from mmslak.datasets.findings import Finding
from mmslak.errors import UserError
from tests.cli.test_train_and_test import SMALL
from tests.forks import in_two_ranks
from tests.golden import ROOT

SEG = 'configs/upernet_slak_t_ade20k.py'
BALLOON = [dict(id=1, name='balloon')]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """The commands are run from the repository's root, on the CPU here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('LOCAL_RANK', '0')


def write_seg(root: Path, values: tuple[int, ...] = (0, 255), suffix: str = '.jpg') -> list[str]:
    """Two pictures for training and validation each; the options of our config that train them.

    The label maps have vertical stripes of the values.
    """
    for split in ('training', 'validation'):
        for i, (height, width) in enumerate([(80, 96), (120, 70)]):
            picture = root / f'images/{split}/{i}{suffix}'
            labels = root / f'annotations/{split}/{i}.png'
            for file in (picture, labels):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (width, height)).save(picture)
            stripes = np.resize(np.repeat(values, 20), width).astype(np.uint8)
            Image.fromarray(np.tile(stripes, (height, 1))).save(labels)
    options = [f'data_root={root}']
    for place in ('train_dataloader', 'val_dataloader'):
        options += [
            f'{place}.dataset.type=BaseSegDataset',
            f'{place}.dataset.metainfo.classes=background,coin',
            f'{place}.dataset.reduce_zero_label=False',
        ]
    reduce = 'dataset.pipeline.{}.reduce_zero_label=False'
    options += ['train_dataloader.' + reduce.format(1), 'val_dataloader.' + reduce.format(2)]
    heads = ('decode_head', 'auxiliary_head')
    return options + SMALL + [f'model.{head}.num_classes=2' for head in heads]


def write_coco(root: Path, categories: list[dict], polygons: bool = True) -> list[str]:
    """Four pictures with a box each; the options of our config that train them."""
    for split in ('train2017', 'val2017'):
        images, annotations = [], []
        for i in range(1, 5):
            images.append(dict(id=i, file_name=f'{i}.jpg', width=100, height=80))
            annotations.append(
                dict(id=i, image_id=i, category_id=categories[0]['id'], bbox=[10, 10, 40, 40],
                     area=1600, iscrowd=0)
            )  # fmt: skip
            if polygons:
                annotations[-1]['segmentation'] = [[10, 10, 50, 10, 50, 50]]
            file = root / split / f'{i}.jpg'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (100, 80)).save(file)
        content = dict(images=images, annotations=annotations, categories=categories)
        file = root / f'annotations/instances_{split}.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return [f'data_root={root}/', 'model.backbone.init_cfg=None']


def write_voc(root: Path, name: str) -> list[str]:
    folder = root / 'VOC2007'
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True)
    for i in range(4):
        Image.new('RGB', (120, 90)).save(folder / f'JPEGImages/{i}.jpg')
        box = '<xmin>10</xmin><ymin>10</ymin><xmax>30</xmax><ymax>30</ymax>'
        (folder / f'Annotations/{i}.xml').write_text(
            '<annotation><size><width>120</width><height>90</height></size>'
            f'<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>'
        )
    for split in ('trainval', 'test'):
        (folder / f'ImageSets/Main/{split}.txt').write_text('0\n1\n2\n3\n')
    return [f'data_root={root}/', 'model.backbone.init_cfg=None']


def refused(capsys, tmp_path: Path, config: str, *options: str) -> str:
    """The one line with which `mmslak train` stops before it builds the model."""
    command = [config, '--work-dir', str(tmp_path / 'work'), '--cfg-options', *options]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ')
    assert not (tmp_path / 'work').exists()
    return error


# ---------------------------------------------------------------- runs


def test_a_run_begins_and_ends_with_what_the_data_lack(tmp_path, monkeypatch, capfd):
    options = write_seg(tmp_path / 'data')
    work = tmp_path / 'work'
    assert not main([SEG, '--work-dir', str(work), '--cfg-options', *options])
    (log,) = work.glob('*/*.log')
    before, between, after = (
        part.splitlines() for part in _split(log.read_text(), 'Iter(train)', 'Iter(val)')
    )
    table = before[before.index(next(line for line in before if 'Census of the data' in line)) :]
    assert table[1].split() == [
        'class',
        'train',
        'pictures',
        'train',
        'pixels',
        'val',
        'pictures',
        'val',
        'pixels',
    ]
    assert table[2].split() == ['background', '2', '9,280', '2', '9,280']
    assert table[3].split() == ['coin', '0', '0', '0', '0']
    warning = (
        "train_dataloader: class 'coin' never occurs, and 255, which is ignored, does in 2 of 2 "
        "label maps (42 % of the pixels): if 255 means 'coin', map it with mmslak prepare-data "
        f'labels {tmp_path}/data/annotations/training {tmp_path}/data/annotations/training_indices '
        "--map 255:1, and set seg_map_path='annotations/training_indices'"
    )
    assert sum(warning in line for line in before) == 1
    assert not any('never occurs' in line for line in between)
    assert sum(f'As said at the start: {warning}' in line for line in after) == 1
    assert not any('Census of the data' in line for line in after)

    # The second start reads no label map.
    monkeypatch.setattr(census, 'count', None)
    cfg = Config.fromfile(log.parent / 'vis_data/config.py')
    (train,) = census_of_config(cfg, ['train_dataloader'])
    assert warning == sentence(train.findings[0])
    capfd.readouterr()
    command = [SEG, '--work-dir', str(tmp_path / 'none'), '--no-census', '--cfg-options', *options]
    assert not main(command)
    assert 'never occurs' not in ''.join(capfd.readouterr())


def _split(text: str, first: str, last: str) -> tuple[str, str, str]:
    before, _, rest = text.partition(first)
    between, _, after = rest.rpartition(last)
    return before, between, after


def test_two_processes_stop_together(tmp_path):
    options = write_seg(tmp_path / 'data', suffix='.JPG')
    command = [SEG, '--launcher', 'pytorch', '--work-dir', str(tmp_path / 'work')]
    ended = in_two_ranks(main, [*command, '--cfg-options', *options])
    assert ended.statuses == [2, 2]
    lines = [line for line in ended.output.splitlines() if line.startswith('error: ')]
    (line,) = lines
    assert 'no picture in' in line


# ---------------------------------------------------------------- stops


def test_a_suffix_that_no_picture_has(tmp_path, capsys):
    options = write_seg(tmp_path / 'data', suffix='.JPG')
    said = (
        f"no picture in {tmp_path}/data/images/training ends in '.jpg'; 2 of 2 files end in "
        "'.JPG': set img_suffix='.JPG' of the dataset"
    )
    assert refused(capsys, tmp_path, SEG, *options) == (
        f'error: train_dataloader: {said} (--no-census leaves this check out)'
    )
    # Commands without a census say the same where the dataset cannot be built.
    dataset = dict(
        type='BaseSegDataset', data_root=str(tmp_path / 'data'),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    )  # fmt: skip
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset)))
    census.init_default_scope('mmseg')
    with pytest.raises(UserError) as caught:
        build_dataset(cfg, 'train_dataloader')
    assert str(caught.value).endswith(said)


def test_coloured_label_maps(tmp_path, capsys):
    options = write_seg(tmp_path / 'data')
    for file in (tmp_path / 'data/annotations').rglob('*.png'):
        Image.open(file).convert('RGB').save(file)
    line = refused(capsys, tmp_path, SEG, *options)
    assert 'train_dataloader: 2 of 2 label maps are in colour (#000000 5' in line
    assert "_indices --map '#000000:0' '#ffffff:1'" in line


@pytest.mark.parametrize('num_classes', [1, 80])
def test_categories_of_ones_own(num_classes, tmp_path, capsys):
    options = write_coco(tmp_path / 'data', BALLOON)
    heads = [f'model.roi_head.bbox_head.{i}.num_classes={num_classes}' for i in range(3)]
    heads += [f'model.roi_head.mask_head.num_classes={num_classes}']
    config = 'configs/cascade_mask_rcnn_slak_t_coco.py'
    line = refused(capsys, tmp_path, config, *options, *heads)
    assert "'balloon'" in line
    assert "set metainfo=dict(classes=('balloon',)) of the dataset" in line
    assert ('num_classes=1 of the heads' in line) == (num_classes == 80)


def test_boxes_alone_for_a_config_with_masks(tmp_path, capsys):
    from mmdet.datasets import CocoDataset

    categories = [dict(id=1, name=CocoDataset.METAINFO['classes'][0])]
    options = write_coco(tmp_path / 'data', categories, polygons=False)
    line = refused(capsys, tmp_path, 'configs/cascade_mask_rcnn_slak_t_coco.py', *options)
    assert '4 of 4 annotations in' in line
    assert "have no 'segmentation'" in line
    assert 'use a config of boxes alone' in line


def test_a_class_of_ones_own_in_voc(tmp_path, capsys):
    options = write_voc(tmp_path / 'data', 'helmet')
    line = refused(capsys, tmp_path, 'configs/faster_rcnn_slak_t_voc07.py', *options)
    assert "are 'helmet' (4 objects), none of which VOCDataset looks for" in line
    assert "set metainfo=dict(classes=('helmet',)) of the dataset, and num_classes=1" in line


# ---------------------------------------------------------------- configs


def seg_config(root: Path, **settings: object) -> dict:
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    return dict(
        type='mmseg.BaseSegDataset', data_root=str(root), data_prefix=prefix,
        metainfo=dict(classes=('background', 'coin')), **settings,
    )  # fmt: skip


def loaders(scope: str, **datasets: dict) -> Config:
    parts = {f'{name}_dataloader': dict(dataset=dataset) for name, dataset in datasets.items()}
    return Config(dict(default_scope=scope, **parts))


def test_wrapped_datasets_are_counted_together(tmp_path):
    write_seg(tmp_path / 'a', (0,)), write_seg(tmp_path / 'b', (1,))
    parts = [seg_config(tmp_path / 'a'), seg_config(tmp_path / 'b')]
    wrapped = dict(type='ConcatDataset', datasets=parts)
    cfg = loaders('mmseg', train=dict(type='RepeatDataset', times=2, dataset=wrapped), val=parts[0])
    train, val = census_of_config(cfg, ['train_dataloader', 'val_dataloader'])
    pixels = 80 * 96 + 120 * 70
    assert train.table == [Row('background', 2, pixels), Row('coin', 2, pixels)]
    assert (train.pictures, train.findings) == (4, [])
    assert train.sizes == dict(smallest=(96, 80), largest=(70, 120))
    never, shared = map(sentence, val.findings)
    assert never == (
        "val_dataloader: class 'coin' never occurs in 2 pictures: not measured here; to measure "
        'it, add pictures that have it'
    )
    assert shared.startswith(
        'val_dataloader: 2 of 2 pictures are in train_dataloader, too, such as '
        f'{tmp_path}/a/images/training/0.jpg: '
    )


def test_pictures_that_another_loader_lists_are_not_spare(tmp_path, monkeypatch):
    write_coco(tmp_path, BALLOON)
    content = json.loads((tmp_path / 'annotations/instances_train2017.json').read_text())
    content['images'].pop(), content['annotations'].pop()
    (tmp_path / 'few.json').write_text(json.dumps(content))
    few = dict(
        type='CocoDataset', data_root=str(tmp_path), ann_file='few.json',
        data_prefix=dict(img='train2017'), metainfo=dict(classes=('balloon',)),
    )  # fmt: skip
    (train,) = census_of_config(loaders('mmdet', train=few), ['train_dataloader'])
    assert [f.kind for f in train.findings] == ['pictures-not-listed']
    other = dict(few, ann_file='annotations/instances_train2017.json')
    cfg = loaders('mmdet', train=few, val=other)
    train, val = census_of_config(cfg, ['train_dataloader', 'val_dataloader'])
    assert (train.findings, [f.kind for f in val.findings]) == ([], ['shared-pictures'])
    monkeypatch.setattr(census, 'count', None)  # the second time nothing is read
    assert census_of_config(cfg, ['train_dataloader', 'val_dataloader']) == [train, val]


def test_pictures_without_labels_beside_others_stop_nothing(tmp_path):
    """As in semi-supervised training."""
    write_coco(tmp_path, BALLOON)
    images = json.loads((tmp_path / 'annotations/instances_val2017.json').read_text())['images']
    content = dict(images=images, categories=BALLOON, annotations=[])
    (tmp_path / 'none.json').write_text(json.dumps(content))
    labelled, unlabelled = (
        dict(
            type='CocoDataset', data_root=str(tmp_path), ann_file=file,
            data_prefix=dict(img='val2017'), metainfo=dict(classes=('balloon',)),
        )
        for file in ('annotations/instances_val2017.json', 'none.json')
    )  # fmt: skip
    cfg = loaders('mmdet', train=unlabelled)
    assert [f.stops for f in census_of_config(cfg, ['train_dataloader'])[0].findings] == [True]
    both = dict(type='ConcatDataset', datasets=[labelled, unlabelled])
    (train,) = census_of_config(loaders('mmdet', train=both), ['train_dataloader'])
    assert not any(finding.stops for finding in train.findings)
    assert train.table == [Row('balloon', 4, 4)]


def test_folds_of_one_folder_share_nothing(tmp_path):
    for folder in ('cat', 'dog'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'x.jpg').write_text(folder)
    whole = dict(type='CustomDataset', data_prefix=str(tmp_path))
    cfg = loaders('mmpretrain', train=whole, val=whole)
    kinds = [f.kind for c in census_of_config(cfg, census.LOADERS) for f in c.findings]
    assert kinds == ['shared-pictures']
    fold = dict(type='KFoldDataset', dataset=whole, num_splits=2)
    cfg = loaders('mmpretrain', train=fold, val=dict(fold, test_mode=True))
    assert [c.findings for c in census_of_config(cfg, census.LOADERS)] == [[], []]


def test_folders_that_validation_lacks_renumber_the_others(tmp_path):
    for folder in ('train/cat', 'train/dog', 'train/emu', 'val/cat', 'val/emu'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'x.jpg').touch()
    parts = {s: dict(type='CustomDataset', data_prefix=f'{tmp_path}/{s}') for s in ('train', 'val')}
    cfg = loaders('mmpretrain', **parts)
    train, val = census_of_config(cfg, ['train_dataloader', 'val_dataloader'])
    assert train.findings == []
    assert [sentence(f) for f in val.findings] == [
        "val_dataloader: folders are numbered in their order: 'emu' is number 1 here and number 2 "
        "in train_dataloader, so that its labels are wrong: make the folders 'dog' there, if need "
        'be empty'
    ]


def test_a_fault_of_the_census_costs_a_warning(tmp_path, monkeypatch):
    write_seg(tmp_path)
    told = []
    monkeypatch.setattr(errors, 'warn', told.append)
    monkeypatch.setattr(census, 'count', lambda *args: 1 / 0)
    assert (
        census_of_config(loaders('mmseg', train=seg_config(tmp_path)), ['train_dataloader']) == []
    )
    assert told == [
        'census_of_loader was left out, since it ended with ZeroDivisionError: division by zero'
    ]


def test_unknown_data_are_passed_over(tmp_path, capsys):
    cfg = loaders('mmpretrain', train=dict(type='CIFAR10', data_root=str(tmp_path)))
    assert census_of_config(cfg, ['train_dataloader']) == []
    remote = seg_config(tmp_path, backend_args=dict(backend='petrel'))
    assert census_of_config(loaders('mmseg', train=remote), ['train_dataloader']) == []


def test_the_cache_knows_its_files(tmp_path):
    write_seg(tmp_path)
    cfg = loaders('mmseg', train=seg_config(tmp_path))

    def amounts() -> list[int]:
        (train,) = census_of_config(cfg, ['train_dataloader'])
        return [row.amount for row in train.table]

    first = amounts()
    assert amounts() == first
    file = tmp_path / 'annotations/training/0.png'
    Image.fromarray(np.ones((80, 96), np.uint8)).save(file)
    assert amounts() == [first[0] - 80 * 56, 80 * 96]
    (tmp_path / 'images/training/0.jpg').unlink()
    assert amounts()[1] == 0
    cfg.train_dataloader.dataset.metainfo.classes = ('a', 'b', 'c')
    assert len(amounts()) == 3


def test_of_many_classes_the_rarest_are_shown():
    table = [Row(f'c{i}', i, 1000 * i) for i in range(150)]
    shown = text_of([Census('train_dataloader', 'pixels', table, 20_210, 2, (500, 20_210), 0.08)])
    lines = shown.splitlines()
    assert lines[0].split() == [
        'the',
        '8',
        'rarest',
        'of',
        '150',
        'train',
        'pictures',
        'train',
        'pixels',
    ]
    assert lines[1].split() == ['c1', '1', '1,000']
    assert len(lines) == 10
    assert lines[-1] == (
        'train_dataloader: 20210 pictures; 500 of 20210 label maps read; 2 without a label; 8.0 % '
        "of the pixels ignored; without 'c0'; 'c149' has 149 times the pixels of 'c1'"
    )


@pytest.mark.parametrize(
    ('unit', 'rare', 'said'),
    [
        ('objects', 198, "; 'person' has 1,325 times the objects of 'drier'"),  # COCO's
        ('pixels', 2624, "; 'person' has 100 times the pixels of 'drier'"),
        ('pixels', 2625, ''),
        ('pixels', 0, ''),
    ],
)
def test_unequal_classes_are_no_warning(unit, rare, said):
    table = [Row('person', 9, 262_465), Row('drier', 2, rare)]
    whole = joined([Census('', unit, table, 9)])
    assert whole.findings == [] or rare == 0
    assert text_of([whole]).splitlines()[-1] == f'data: 9 pictures{said}'


def listed(root: Path, **settings: object) -> Config:
    """A config whose list names the pictures 0 and 1."""
    (root / 'list.txt').write_text('0\n1\n')
    dataset = seg_config(root, ann_file=str(root / 'list.txt'), **settings)
    return loaders('mmseg', train=dataset)


def test_what_to_do_about_absent_files(tmp_path):
    write_seg(tmp_path, (0, 1))
    cfg = listed(tmp_path)
    (tmp_path / 'images/training/1.jpg').unlink()
    (tmp_path / 'annotations/training/0.png').unlink()
    (train,) = census_of_config(cfg, ['train_dataloader'])
    mend = f'; bring them back, or take them out of {tmp_path}/list.txt'
    assert [f.message.removesuffix(mend) for f in train.findings] == [
        f'1 of 2 pictures that {tmp_path}/list.txt lists are not in {tmp_path}/images/training: '
        '1.jpg',
        f'1 of 2 pictures have no label map: {tmp_path}/annotations/training/0.png',
    ]
    assert all(f.message.endswith(mend) for f in train.findings)
    (tmp_path / 'images/training/1.jpg').touch()
    cfg = loaders('mmseg', train=seg_config(tmp_path))
    (train,) = census_of_config(cfg, ['train_dataloader'])
    assert train.findings[0].message.endswith('0.png; bring them back, or take their pictures away')


def test_findings_are_logged_as_warnings(caplog):
    logger = logging.getLogger('census')
    found = [Census('val_dataloader', findings=[Finding('x', 'odd', 'val_dataloader')])]
    with caplog.at_level(logging.INFO, 'census'):
        census.log(found, logger)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ('WARNING', 'val_dataloader: odd')
    ]


def test_num_classes_with_advice_from_the_files(tmp_path):
    write_coco(tmp_path, BALLOON)
    dataset = dict(
        type='CocoDataset', data_root=str(tmp_path), data_prefix=dict(img='train2017'),
        ann_file='annotations/instances_train2017.json',
    )  # fmt: skip
    cfg = loaders('mmdet', train=dataset)
    cfg.model = dict(roi_head=dict(bbox_head=dict(num_classes=2)))
    with pytest.raises(UserError) as caught:
        check_datasets(cfg, ['train_dataloader'])
    assert str(caught.value) == (
        'wrong number of classes: model.roi_head.bbox_head.num_classes is 2, but CocoDataset has '
        "80 classes; the classes of its files are 'balloon': set "
        "metainfo=dict(classes=('balloon',)) of the dataset and num_classes=1 of the heads; if its "
        '80 classes are meant, set --cfg-options model.roi_head.bbox_head.num_classes=80'
    )
