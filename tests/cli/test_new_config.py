"""`mmslak new-config`: from folders as people bring them to trained, tested and drawn."""

import json
import math
import os
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmslak.apis.new_config import LIKE, Machine, this_machine, write_config
from mmslak.cli import new_config as new_config_command
from mmslak.cli import runner
from mmslak.cli.census import ABSENT, census_of_config
from mmslak.cli.main import main
from mmslak.datasets.formats import complete_splits, recognise
from mmslak.datasets.formats.label_maps import name_classes
from tests.datasets.test_formats import (
    coco,
    save_labels,
    save_picture,
    write,
    write_class_folders,
    write_coco_file,
    write_devkit,
    write_label_maps,
    write_palettes,
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
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
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
    new_config(*more)
    assert f"_base_ = ['mmslak::{like}.py']" in Path('my.py').read_text()
    after = {p: p.read_bytes() for p in (tmp_path / 'data').rglob('*') if p.is_file()}
    assert after == before, 'the data stays as it is'

    options = [*small, *([SCALES] if 'faster' in like else [])]
    options = [o for o in options if not o.startswith(('model.backbone.init_cfg', 'train_cfg'))]
    options.append('train_dataloader.batch_size=4')
    assert main(['train', 'my.py', '--iterations', '2', '--cfg-options', *options]) == 0
    checkpoint = 'work_dirs/my_short/iter_2.pth'
    capsys.readouterr()
    assert main(['test', 'my.py', checkpoint, '--cfg-options', *options]) == 0
    assert f'\n{SCORES[like.partition("_")[0]]}: ' in capsys.readouterr().out
    picture = next(p for p in before if p.suffix in ('.jpg', '.JPG', '.jpeg'))
    drawn = ['demo', str(picture), 'my.py', checkpoint, '--cfg-options', *options]
    assert main(drawn) == 0
    assert Image.open(f'work_dirs/my/demo/{picture.stem}.png').size[0] > 30


# ---------------------------------------------------------------- what is written


def test_the_same_data_gives_the_same_lists(tmp_path):
    write_label_maps(tmp_path / 'data')
    new_config(*CLASSES)
    before = {p.name: p.read_text() for p in Path('my_data').iterdir()}
    assert set(before) == {'train.txt', 'val.txt'}
    new_config(*CLASSES, '--force')
    assert {p.name: p.read_text() for p in Path('my_data').iterdir()} == before
    names = ''.join(before.values()).splitlines()
    assert sorted(names) == sorted(f'site {i % 2}/Bild ä{i}' for i in range(10))


def built(cfg: Config, dataset: dict) -> list[dict]:
    """What a data set of the config knows of its samples."""
    init_default_scope(cfg.default_scope)
    made = DATASETS.build(dict(dataset, pipeline=[]))
    return [made.get_data_info(i) for i in range(len(made))]


def of_folders_with_a_split(root: Path) -> Config:
    """The config of two pictures for training and validation each, with two classes."""
    for split in ('train', 'val'):
        for i in range(2):
            save_picture(root / f'data/{split}/images/{i}.jpg')
            save_labels(root / f'data/{split}/masks/{i}.png', [0, 1, 2])
    return new_config('--classes', 'road,car', '--ignore', 0)


def test_folders_with_a_split_are_read_without_lists(tmp_path):
    cfg = of_folders_with_a_split(tmp_path)
    assert not Path('my_data').exists()
    assert cfg.train_dataloader.dataset.data_prefix.img_path == 'train/images'
    for place in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
        assert place.reduce_zero_label
        assert [t.reduce_zero_label for t in place.pipeline if 'Annotations' in t.type] == [None]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2
    found = built(cfg, cfg.val_dataloader.dataset)
    assert [Path(d['img_path']).name for d in found] == ['0.jpg', '1.jpg']


def test_pictures_beside_their_label_maps(tmp_path):
    for i in range(4):
        save_picture(tmp_path / f'data/{i}.png')
        save_labels(tmp_path / f'data/{i}_mask.png', [0, 1])
    cfg = new_config(*CLASSES)
    found = [built(cfg, cfg[loader].dataset) for loader in ('train_dataloader', 'val_dataloader')]
    assert [len(samples) for samples in found] == [3, 1]
    assert Path(found[1][0]['seg_map_path']).is_file()


@pytest.mark.parametrize('splits', [('',), ('train', 'val', 'test')])
@pytest.mark.parametrize('suffixes', [('.JPG', '.png'), ('.JPG', '.png', '.jpeg', '.bmp', '.tif')])
def test_pictures_of_several_suffixes(tmp_path, suffixes, splits):
    """A data set for each, since one reads a single suffix."""
    for split in splits:
        for i in range(20):
            save_picture(tmp_path / f'data/img/{split}/{i}{suffixes[i % len(suffixes)]}')
            save_labels(tmp_path / f'data/ann/{split}/{i}.png', [0, 1])
    cfg = new_config(*CLASSES)
    parts = [cfg[f'{split}_dataloader'].dataset for split in splits if split]
    parts = parts or [cfg.train_dataloader.dataset, cfg.val_dataloader.dataset]
    assert len(parts[0].datasets) == len(suffixes)
    found = [d for part in parts for one in part.datasets for d in built(cfg, one)]
    assert len({d['img_path'] for d in found}) == 20 * len(splits)
    assert all(Path(d[key]).is_file() for d in found for key in ('img_path', 'seg_map_path'))


@pytest.mark.parametrize('weights', [None, '/' + 'long/' * 12 + 'slak_tiny_in1k.pth'])
@pytest.mark.parametrize(
    ('kind', 'like'),
    [
        *((kind, like) for kind, (_, like, *_) in FORMATS.items()),
        ('coco', 'faster_rcnn_slak_t_voc07'),
    ],
)
def test_at_most_40_lines(tmp_path, kind, like, weights):
    """With a test set, lists of all splits, many classes, and weights that are elsewhere."""
    write, _, names, _ = FORMATS[kind]
    write(tmp_path / 'data')
    data = recognise(tmp_path / 'data')
    if names:
        name_classes(data, names[1].split(','))
    data.kind = LIKE[like][0]
    complete_splits(data)
    data.splits['test'] = data.splits['val']
    for count in (2, 10, 60):
        data.classes = ('background', *(f'class with number {i}' for i in range(1, count)))
        text, _ = write_config(data, like, Machine(80, weights is not None, weights), 'my_data')
        assert len(text.splitlines()) <= 40


@pytest.mark.parametrize('first', ['background', 'sky'])
@pytest.mark.parametrize('count', [2, 5, 11, 12, 150])
def test_colours_of_classes_differ(tmp_path, count, first):
    write_label_maps(tmp_path / 'data')
    data = recognise(tmp_path / 'data')
    name_classes(data, [first, *map(str, range(1, count))])
    complete_splits(data)
    text, files = write_config(data, 'upernet_slak_t_ade20k', LAPTOP, 'my_data')
    (tmp_path / 'my.py').write_text(text)
    for name, content in files.items():
        write(tmp_path / 'my_data' / name, content)
    palette = Config.fromfile(str(tmp_path / 'my.py')).val_dataloader.dataset.metainfo.palette
    assert len(palette) == count
    assert (palette[0] == [0, 0, 0]) == (first == 'background')
    assert min(math.dist(*pair) for pair in combinations(palette, 2)) > (60 if count < 20 else 40)


@pytest.mark.parametrize('where', ['config', 'elsewhere'])
def test_data_and_lists_are_found_from_any_folder(tmp_path, monkeypatch, where):
    """And in a folder whose name needs care."""
    folder = tmp_path / "Anna's data"
    write_class_folders(folder)
    assert main(['new-config', folder.name, '--out', f'{folder.name}/my.py']) == 0
    monkeypatch.chdir(folder if where == 'config' else '/')
    cfg = Config.fromfile(str(folder / 'my.py'))
    found = built(cfg, cfg.train_dataloader.dataset) + built(cfg, cfg.val_dataloader.dataset)
    assert len(found) == 20
    assert all(Path(d['img_path']).is_file() for d in found)


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_class_folders(tmp_path / 'data')
    assert main(['new-config', '~/data', '--out', 'my.py']) == 0
    assert Config.fromfile('my.py').data_root == str(tmp_path / 'data')


def test_many_classes_are_in_a_file(tmp_path):
    names = [f'a class with number {i}' for i in range(60)]
    for i in range(2):
        save_picture(tmp_path / f'data/img/{i}.png')
        save_labels(tmp_path / f'data/ann/{i}.png', list(range(60)))
    (tmp_path / 'data/classes.txt').write_text('\n'.join(names))
    cfg = new_config()
    assert cfg.model.decode_head.num_classes == 60
    init_default_scope('mmseg')
    dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, pipeline=[]))
    assert list(dataset.metainfo['classes']) == names
    assert len({tuple(colour) for colour in dataset.metainfo['palette']}) == 60


def test_colours_of_the_data_are_kept(tmp_path):
    write_palettes(tmp_path / 'data')
    cfg = new_config(*CLASSES)
    assert cfg.val_dataloader.dataset.metainfo.palette == [[0, 0, 0], [128, 0, 0]]


def test_boxes_of_coco_and_a_test_set(tmp_path):
    """A detector without masks reads COCO's boxes; each split has its scores."""
    for split in ('train', 'val', 'test'):
        content = coco(2, ['balloon'], masks=False)
        for image in content['images']:
            save_picture(tmp_path / f'data/{split}/{image["file_name"]}')
        (tmp_path / f'data/{split}.json').write_text(json.dumps(content))
    cfg = new_config()
    assert "'mmslak::faster_rcnn_slak_t_voc07.py'" in Path('my.py').read_text()
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    assert cfg.train_dataloader.dataset.pipeline[2].type == 'RandomChoiceResize'
    data = tmp_path / 'data'
    assert cfg.val_evaluator == dict(type='CocoMetric', metric='bbox', ann_file=f'{data}/val.json')
    assert cfg.test_evaluator.ann_file == f'{data}/test.json'
    assert cfg.test_dataloader.dataset.ann_file == 'test.json'
    assert cfg.model.roi_head.bbox_head.num_classes == 1


def test_a_devkit_keeps_its_metric(tmp_path):
    write_devkit(tmp_path / 'data', trainval=[0, 1], test=[2])
    cfg = new_config()
    assert cfg.val_evaluator.type == 'VOCMetric'
    assert cfg.default_hooks.checkpoint.save_best == 'pascal_voc/mAP'
    assert cfg.train_dataloader.dataset.ann_file == 'VOC2007/ImageSets/Main/trainval.txt'
    assert 'bbox_min_size' not in cfg.train_dataloader.dataset.filter_cfg


def test_masks_are_left_out_if_asked(tmp_path):
    write_coco_file(tmp_path / 'data')
    assert new_config('--like', 'faster_rcnn_slak_t_voc07').val_evaluator.metric == 'bbox'


# ---------------------------------------------------------------- when files are gone later


def absent(cfg: Config) -> list[str]:
    """What the census says of files that are gone."""
    taken = census_of_config(cfg, ['train_dataloader', 'val_dataloader'])
    return [f.message for census in taken for f in census.findings if f.kind in ABSENT]


@pytest.mark.parametrize('name', FORMATS)
def test_a_picture_that_is_gone_and_the_command_that_is_said(tmp_path, name):
    write, _, more, _ = FORMATS[name]
    write(tmp_path / 'data')
    cfg = new_config(*more)
    assert absent(cfg) == []
    train, root = cfg.train_dataloader.dataset, tmp_path / 'data'
    gone = Path(built(cfg, train)[0]['img_path'])
    gone.rename(gone.with_stem('renamed'))
    (said,) = absent(cfg)
    folder = f'{root}/images' if name == 'label_maps' else root
    count = {'yolo': 8, 'class_folders': 16}.get(name, 8)
    assert said.startswith(
        f'1 of {count} pictures that {tmp_path}/my_data/{Path(train.ann_file).name} lists are not '
        f'in {folder}: {gone.relative_to(folder)}; if they are not to come back, write the lists '
        f'anew: mmslak new-config {root} --out my.py --force'
    )
    assert main(shlex.split(said.rpartition(': ')[2])[1:]) == 0
    assert absent(Config.fromfile('my.py')) == []


def test_a_label_map_that_is_gone(tmp_path):
    write_label_maps(tmp_path / 'data')
    cfg = new_config(*CLASSES)
    gone = Path(built(cfg, cfg.train_dataloader.dataset)[0]['seg_map_path'])
    gone.unlink()
    (said,) = absent(cfg)
    assert said == (
        f'1 of 8 pictures have no label map: {gone}; if they are not to come back, write the lists '
        f'anew: mmslak new-config {tmp_path}/data --out my.py --force --classes background,road'
    )


def test_a_label_map_that_is_gone_from_folders_without_lists(tmp_path):
    cfg = of_folders_with_a_split(tmp_path)
    (tmp_path / 'data/train/masks/1.png').unlink()
    (said,) = absent(cfg)
    assert said.endswith(' --out my.py --force --ignore 0 --classes road,car')
    assert main(shlex.split(said.rpartition(': ')[2])[1:]) == 0
    cfg = Config.fromfile('my.py')
    assert absent(cfg) == []
    assert len(built(cfg, cfg.train_dataloader.dataset)) == 1


def test_lists_of_the_data_itself_are_to_be_mended(tmp_path):
    write_devkit(tmp_path / 'data', trainval=[0, 1], test=[2])
    cfg = new_config()
    (tmp_path / 'data/VOC2007/JPEGImages/0.jpg').unlink()
    (said,) = absent(cfg)
    source = f'{tmp_path}/data/VOC2007/ImageSets/Main/trainval.txt'
    assert said.endswith(f'JPEGImages: 0.jpg; bring them back, or take them out of {source}')


# ---------------------------------------------------------------- schedule, machine, weights


def config_for(tmp_path: Path, kind: str, machine: Machine, count: int = 10) -> Config:
    """A config for some number of pictures on some machine."""
    write, like, names, _ = FORMATS[kind]
    if not (tmp_path / 'data').exists():
        write(tmp_path / 'data')
    data = recognise(tmp_path / 'data')
    if names:
        name_classes(data, names[1].split(','))
    complete_splits(data)
    data.splits['train'] = (data.splits['train'] * count)[:count]
    text, _ = write_config(data, like, machine, 'my_data')
    (tmp_path / 'my.py').write_text(text)
    return Config.fromfile(str(tmp_path / 'my.py'))


LAPTOP, LARGE = Machine(24, False, None), Machine(80, True, 'checkpoints/slak_tiny_in1k.pth')


@pytest.mark.parametrize(
    ('count', 'steps'), [(10, 2000), (1000, 64000), (1001, 64100), (100000, 160000)]
)
def test_steps_of_segmentors_follow_the_pictures(tmp_path, count, steps):
    cfg = config_for(tmp_path, 'label_maps', LAPTOP, count)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == steps
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == min(1500, steps // 10)


@pytest.mark.parametrize(('count', 'epochs'), [(10, 200), (100, 80), (10000, 36)])
def test_epochs_of_detectors_follow_the_pictures(tmp_path, count, epochs):
    cfg = config_for(tmp_path, 'yolo', LAPTOP, count)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == epochs
    assert cfg.param_scheduler[1].milestones == [epochs * 3 // 4, epochs * 11 // 12]


@pytest.mark.parametrize(('count', 'epochs'), [(16, 300), (400, 80), (10000, 30)])
def test_epochs_of_classifiers_follow_the_pictures(tmp_path, count, epochs):
    cfg = config_for(tmp_path, 'class_folders', LAPTOP, count)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == epochs


@pytest.mark.parametrize(
    ('kind', 'rule', 'short', 'end'),
    [
        ('label_maps', 'iterations = 2000', 'iterations = 20', 20),
        ('coco', 'max_epochs = 200', 'max_epochs = 2', 2),
        ('yolo', 'max_epochs = 200', 'max_epochs = 1', 1),
        ('class_folders', 'max_epochs = 300', 'max_epochs = 2', 2),
    ],
)
def test_one_number_makes_a_short_run(tmp_path, kind, rule, short, end):
    config_for(tmp_path, kind, LAPTOP, 16)
    text = (tmp_path / 'my.py').read_text()
    assert f'\n{rule}\n' in text
    (tmp_path / 'my.py').write_text(text.replace(rule, short))
    cfg = Config.fromfile(str(tmp_path / 'my.py'))
    warm_up, decay = cfg.param_scheduler
    assert warm_up.get('begin', 0) < warm_up.end
    assert decay.get('begin', 0) < decay.end == end
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval <= end


@pytest.mark.parametrize(
    ('kind', 'machine', 'batch'),
    [
        ('label_maps', LAPTOP, 2),
        ('label_maps', LARGE, 4),
        ('label_maps', Machine(4, True, None), 4),  # small crops
        ('coco', LARGE, 2),
        ('coco', Machine(8, True, None), 1),
        ('class_folders', LAPTOP, 16),
        ('class_folders', Machine(11, True, None), 44),
    ],
)
def test_batches_follow_the_memory(tmp_path, kind, machine, batch):
    cfg = config_for(tmp_path, kind, machine, 1000)
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch


@pytest.mark.parametrize(('kind', 'place'), [('yolo', 2), ('coco', 4)])
@pytest.mark.parametrize(
    ('machine', 'scale', 'sides'),
    [
        (LARGE, (1333, 800), [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]),
        (LAPTOP, (667, 400), [240, 256, 272, 288, 304, 320, 336, 352, 368, 384, 400]),
    ],
)
def test_pictures_of_detectors_are_half_as_large_without_a_gpu(
    tmp_path, kind, place, machine, scale, sides
):
    cfg = config_for(tmp_path, kind, machine)
    assert cfg.val_dataloader.dataset.pipeline[1].scale == scale
    resize = cfg.train_dataloader.dataset.pipeline[place]
    assert resize.type == 'RandomChoiceResize'
    assert resize.scales == [(side, scale[0]) for side in sides]


def test_crops_are_not_larger_than_the_pictures(tmp_path):
    cfg = config_for(tmp_path, 'label_maps', LARGE)  # of 96 by 72 pixels
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (128, 128)
    assert cfg.model.test_cfg.crop_size == cfg.model.data_preprocessor.size == (128, 128)
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (512, 128)


@pytest.mark.parametrize('kind', FORMATS)
def test_weights(tmp_path, kind):
    """Those that are here are used with their zeros; without them all is trained alike."""
    for file in (None, 'checkpoints/slak_tiny_in1k.pth', '/elsewhere/slak_tiny_in1k.pth'):
        cfg = config_for(tmp_path, kind, Machine(24, True, file))
        init = cfg.model.backbone.get('init_cfg')
        hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')] if file else []
        assert (init and init.checkpoint) == file
        assert cfg.custom_hooks == hooks
        decay = cfg.optim_wrapper.paramwise_cfg.get('decay_rate')
        if 'constructor' in cfg.optim_wrapper:
            assert (decay == 1.0) == (file is None)
        lines = (tmp_path / 'my.py').read_text().splitlines()
        assert len(lines) <= 40
        assert any('get-checkpoint slak_tiny' in line for line in lines) == (file is None)


def test_weights_are_found_from_any_folder(tmp_path):
    assert this_machine().weights is None
    Path('checkpoints').mkdir()
    Path('checkpoints/slak_tiny_in1k.pth').touch()
    assert this_machine().weights == f'{tmp_path}/checkpoints/slak_tiny_in1k.pth'


def test_weights_are_found_where_torch_keeps_them(monkeypatch):
    """As torch says, which the command does not load."""
    for name in ('TORCH_HOME', 'XDG_CACHE_HOME', 'HOME'):  # each before the next ones
        monkeypatch.delenv('TORCH_HOME', raising=False)
        monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
        monkeypatch.setenv(name, os.path.abspath(name))
        file = Path(torch.hub.get_dir(), 'checkpoints/slak_tiny_in1k.pth')
        assert this_machine().weights is None
        file.parent.mkdir(parents=True)
        file.touch()
        assert this_machine().weights == str(file)


def test_memory_is_that_of_the_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    machine = this_machine()
    assert not machine.has_gpu
    assert machine.memory > 0.5


# ---------------------------------------------------------------- questions and errors


def answers(monkeypatch, *given: str) -> list[str]:
    """Lets a person at a terminal give some answers; returns what they are asked."""
    asked, rest = [], list(given)
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr('builtins.input', lambda text: asked.append(text) or rest.pop(0))
    return asked


@pytest.mark.parametrize(
    ('given', 'classes', 'ignore_zero'),
    [
        (['y', ''], ['background', 'class1', 'class2'], False),
        (['', 'sky, road ,car'], ['sky', 'road', 'car'], False),
        (['n', ''], ['class1', 'class2'], True),
    ],
)
def test_names_are_asked_for(tmp_path, monkeypatch, given, classes, ignore_zero):
    for i in range(2):
        save_picture(tmp_path / f'data/img/{i}.png')
        save_labels(tmp_path / f'data/ann/{i}.png', [0, 1, 2])
    asked = answers(monkeypatch, *given)
    cfg = new_config()
    assert list(cfg.classes) == classes
    assert cfg.val_dataloader.dataset.reduce_zero_label == ignore_zero
    assert len(asked) == 2


def test_without_a_terminal_the_option_is_named(tmp_path, capsys):
    write_label_maps(tmp_path / 'data')
    said = refused(capsys)
    assert 'have the values 0 (71%), 1 (29%), without names: name them' in said
    assert 'with --classes A,B, or one on a line in data/classes.txt; if 0 is no class, add' in said


@pytest.mark.parametrize('ignored', [(), ('--ignore', '0')])
def test_names_are_kept_when_a_config_is_written_anew(tmp_path, capsys, ignored):
    for i in range(10):
        save_picture(tmp_path / f'data/img/{i}.jpg')
        save_labels(tmp_path / f'data/ann/{i}.png', [0, 1, 2])
    names = 'tree,car' if ignored else 'soil,tree,car'
    before = new_config('--classes', names, *ignored)
    after = new_config('--force')
    assert before.pretty_text == after.pretty_text
    said = capsys.readouterr().out
    assert 'note: names of the classes are those of my.py before' in said
    assert '1 = tree (8), 2 = car (8)' in said


def test_many_names_are_kept_in_a_file(tmp_path):
    names = [f'a long name of class {i}' for i in range(60)]
    for i in range(10):
        save_picture(tmp_path / f'data/img/{i}.jpg')
        save_labels(tmp_path / f'data/ann/{i}.png', range(60))
    new_config('--classes', ','.join(names))
    assert Path(new_config('--force').classes).read_text().splitlines() == names


def test_another_kind_of_labels(tmp_path, capsys):
    write_yolo(tmp_path / 'data')
    said = refused(capsys, '--like', 'cascade_mask_rcnn_slak_t_coco')
    assert said.endswith('--like faster_rcnn_slak_t_voc07')
    said = refused(capsys, '--like', 'upernet_slak_t_ade20k')
    assert '--like upernet_slak_t_ade20k needs segmentation, but data has boxes' in said
    assert '--classes and --ignore are for label maps' in refused(capsys, '--classes', 'a')
    assert 'not recognised' in refused(capsys, '--format', 'voc')


def test_the_format_that_a_config_reads_goes_first(tmp_path):
    write_label_maps(tmp_path / 'data')
    (tmp_path / 'data/more.json').write_text(json.dumps(coco(1, ['a'])))
    save_picture(tmp_path / 'data/0.jpg')
    new_config('--like', 'upernet_slak_t_ade20k', *CLASSES)
    new_config('--force')
    assert 'cascade_mask_rcnn' in Path('my.py').read_text()


def test_nothing_is_overwritten(tmp_path, capsys):
    write_class_folders(tmp_path / 'data')
    Path('my_data').mkdir()
    Path('my_data/val.txt').write_text('mine')
    assert refused(capsys).startswith('error: my_data/val.txt is there already; --force')
    Path('my.py').write_text('mine')
    assert main(['new-config', 'data', '--out', 'my.py']) == 2
    assert capsys.readouterr().err.startswith('error: my.py is there already; --force')
    assert Path('my.py').read_text() == 'mine'
    new_config('--force')


def test_what_was_written_is_not_taken_for_data(tmp_path, monkeypatch):
    """A config may be written into the folder of the data, and again."""
    write_yolo(tmp_path / 'data')
    monkeypatch.chdir(tmp_path / 'data')
    for more in ([], ['--force']):
        assert main(['new-config', '.', '--out', 'my.py', *more]) == 0
        content = json.loads(Path('my_data/train.json').read_text())
        assert [image['file_name'] for image in content['images']][:1] == ['train/images/0.jpg']
        cfg = Config.fromfile('my.py')
        assert len(built(cfg, cfg.train_dataloader.dataset)) == 8


def test_the_libraries_are_not_loaded(tmp_path):
    """They take seconds to load; for a GPU alone torch is asked."""
    code = (
        'import sys; from mmslak.apis import new_config; from mmslak.cli.main import main; '
        'new_config._gpu_memory = lambda: 0; status = main(["new-config", "data", "--out", '
        '"my.py"]); print(status, sorted({"torch", "mmengine"} & set(sys.modules)))'
    )
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('2 []\n', 'error: data: no such folder\n')
    write_class_folders(tmp_path / 'data')
    assert subprocess.run(command, capture_output=True, text=True).stdout.endswith('\n0 []\n')


def test_a_library_that_is_missing(tmp_path, capsys, monkeypatch):
    write_class_folders(tmp_path / 'data')
    monkeypatch.setattr(new_config_command, 'find_spec', lambda name: name != 'mmpretrain' or None)
    assert main(['new-config', 'data', '--out', 'my.py']) == 2
    assert capsys.readouterr().err == (
        'error: my.py is written, and needs mmpretrain, which is not installed\n'
    )


def test_wrong_arguments(tmp_path, capsys):
    assert 'data: no such folder' in refused(capsys)
    write_class_folders(tmp_path / 'data')
    assert main(['new-config', 'data', '--out', 'my']) == 2
    assert 'a config is a Python file; try my.py' in capsys.readouterr().err


def test_what_is_said(tmp_path, capsys):
    write_class_folders(tmp_path / 'data')
    new_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'data: class-folders, classification'
    assert lines[1].startswith('  recognised by a folder of pictures for each class')
    assert lines[2].startswith('  pictures: 16 train, 4 val (a fifth for val, by a hash')
    assert lines[3] == '  classes, with pictures to train on: big dogs (8), cats (8)'
    assert 'written: my.py, with my_data' in lines
    assert lines[-2:] == [
        '         mmslak test my.py work_dirs/my/epoch_300.pth',
        '         mmslak demo PICTURES my.py work_dirs/my/epoch_300.pth',
    ]
