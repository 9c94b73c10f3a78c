"""`mmslak new-config`: from folders as people bring them to trained, tested and drawn."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmslak.apis import new_config as writer
from mmslak.cli import runner
from mmslak.cli.main import main
from tests import miniatures
from tests.datasets.test_formats import (
    write_class_folders,
    write_coco_file,
    write_label_maps,
    write_voc_folder,
    write_yolo,
)
from tests.test_recipes import BACKBONE, CASCADE, CLASSIFIER, FASTER, NECK, SMALL

CLASSES = ['--classes', 'background,road']
# What each format makes: a config of ours, options of new-config, and options that shrink its
# model and schedule.
FORMATS = dict(
    label_maps=(write_label_maps, 'upernet_slak_t_ade20k', CLASSES, SMALL),
    coco=(write_coco_file, 'cascade_mask_rcnn_slak_t_coco', [], [*BACKBONE, *NECK, *CASCADE]),
    voc=(write_voc_folder, 'faster_rcnn_slak_t_voc07', [], [*BACKBONE, *NECK, *FASTER]),
    yolo=(write_yolo, 'faster_rcnn_slak_t_voc07', [], [*BACKBONE, *NECK, *FASTER]),
    class_folders=(
        write_class_folders,
        'slak_t_imagenet',
        [],
        [*BACKBONE, 'model.head.in_channels=76', *CLASSIFIER],
    ),
)
SCALES = 'train_dataloader.dataset.pipeline.2.scales=[(64,128),(96,128)]'
SCORES = dict(upernet='mIoU', cascade='coco/segm_mAP', faster='coco/bbox_mAP', slak='accuracy/top1')


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Commands run in a folder of their own, on the CPU, without downloaded weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(writer.torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: False, raising=False)


def new_config(*argv: object) -> Config:
    """The config that the command writes for ./data."""
    assert main(['new-config', 'data', '--out', 'my.py', *map(str, argv)]) == 0
    assert len(Path('my.py').read_text().splitlines()) <= 40
    return Config.fromfile('my.py')


def refused(capsys, *argv: object) -> str:
    assert main(['new-config', 'data', '--out', 'my.py', *map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path('my.py').exists()
    return line


@pytest.mark.parametrize('name', FORMATS)
def test_from_a_folder_to_a_picture(name, tmp_path, capsys):
    """new-config, train, test and demo, without an edit by hand."""
    write, like, more, small = FORMATS[name]
    if 'rcnn' in like:
        pytest.importorskip('mmcv._ext')
    before = write(tmp_path / 'data')
    cfg = new_config(*more)
    assert f"_base_ = ['mmslak::{like}.py']" in Path('my.py').read_text()
    after = {p: p.read_bytes() for p in (tmp_path / 'data').rglob('*') if p.is_file()}
    assert after == before, 'the data stays as it is'

    options = [*small, *([SCALES] if 'faster' in like else [])]
    options = [o for o in options if not o.startswith(('model.backbone.init_cfg', 'train_cfg'))]
    options += ['train_dataloader.batch_size=4', 'default_hooks.checkpoint.interval=1']
    if 'max_iters' in cfg.train_cfg:
        options += ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    else:
        options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    assert main(['train', 'my.py', '--cfg-options', *options]) == 0
    last = 'iter_2.pth' if 'max_iters' in cfg.train_cfg else 'epoch_1.pth'
    checkpoint = f'work_dirs/my/{last}'
    capsys.readouterr()
    assert main(['test', 'my.py', checkpoint, '--cfg-options', *options]) == 0
    assert f'\n{SCORES[like.partition("_")[0]]}: ' in capsys.readouterr().out
    picture = next(p for p in before if p.suffix.lower() in ('.jpg', '.jpeg'))
    drawn = ['demo', str(picture), 'my.py', checkpoint, '--cfg-options', *options]
    assert main(drawn) == 0
    assert Image.open(f'work_dirs/pictures/{picture.stem}.png').size[0] > 30
