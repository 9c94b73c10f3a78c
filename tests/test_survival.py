"""tools/train.py under what happens to long runs: kills, full disks, signals, bad samples."""

import json
import re
import signal
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from PIL import Image

from mmslak.cli import runner
from mmslak.cli.runner import SURVIVAL, enable_survival
from mmslak.datasets.guard import innermost
from mmslak.datasets.sample_list import SampleList
from mmslak.datasets.samples import MEND, SKIP, BadSampleError, check_file
from mmslak.engine import BadSampleHook
from tests import forks, miniatures, survival
from tests.cli.test_train_and_test import load_main
from tests.golden import ROOT
from tests.toy import Data, build_runner

train_tool, check_tool = load_main('train'), load_main('check_dataset')
WAY_ON = f'{MEND} and go on with --resume, {SKIP}'


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('LOCAL_RANK', '0')


def scenario(*arguments: object) -> list[dict]:
    """What `python tests/survival.py …` prints."""
    ended = forks.run(survival.main, [str(argument) for argument in arguments])
    lines = [line for line in ended.output.splitlines() if line.startswith('{')]
    assert ended.statuses == [0], ended.output[-3000:]
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- kills, signals, disks


def test_killed_runs_end_the_same(tmp_path):
    """All 20 kills of each task, in 1 and 2 processes: the command in tests/survival.py."""
    once, alone, both = ('--kills', 1, '--iters', 6), ('seg', 'det', 'cls'), ('seg', 'distilled')
    found = scenario(tmp_path, 'kills', *once, '--tasks', *alone, '--workers', 2)
    found += scenario(tmp_path, 'kills', *once, '--tasks', *both, '--processes', 2)
    assert [run['task'] for run in found] == [*alone, *both]
    for run in found:
        assert run['same'], run
        assert len(run['killed_in']) == len(run['resumed_from']) >= 1
        for killed, resumed in zip(run['killed_in'], run['resumed_from']):
            assert killed - 2 <= resumed <= killed  # no work older than one interval is lost
            assert 0 < resumed < run['iterations']  # from a checkpoint, with more to train
            assert killed < run['iterations']


def test_a_kill_at_every_step_of_a_save(tmp_path):
    """Write, flush, rename, marker, removal."""
    found = scenario(tmp_path, 'saves')
    steps = [run['step'] for run in found]
    assert {'write', 'fsync', 'replace', 'remove', 'marker write', 'marker replace'} <= set(steps)
    for run in found:
        assert run['status'] == 9
        assert run['resumed_from'] >= run['before'], run
        assert run['same'] in (True, None), run
        if run['same']:
            assert run['left'] == ['iter_6.pth', 'iter_8.pth']
    assert sum(run['same'] is True for run in found) >= 3


def test_signals_save_and_the_run_goes_on(tmp_path):
    found = {run['what']: run for run in scenario(tmp_path, 'signals')}
    for what, status in (
        ('SIGTERM', 143),
        ('SIGINT', 130),
        ('SIGTERM to the group', 143),
        ('SIGTERM in validation', 143),
        ('SIGTERM twice', 143),
    ):
        assert found[what]['statuses'] == [status], found[what]
        assert found[what]['same'], found[what]
    assert found['SIGTERM to one of two']['statuses'] == [143, 143]
    assert found['SIGTERM to one of two']['same']
    assert found['SIGTERM again']['statuses'] == [-signal.SIGTERM]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    (found,) = scenario(tmp_path, 'disk')
    assert found['statuses'] == [2]
    assert 'iter_4.pth cannot be written' in found['says']
    assert 'go on with --resume' in found['says']
    assert found['left'] == ['iter_2.pth', 'last_checkpoint']
    assert found['same']


# ---------------------------------------------------------------- bad samples

SEG = """
_base_ = ['mmseg::_base_/models/fcn_unet_s5-d16.py', 'mmseg::_base_/default_runtime.py']
norm_cfg = dict(type='BN')
model = dict(_delete_=True, type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), pad_val=0, seg_pad_val=255),
    backbone=dict(type='mmslak.SLaK', arch=dict(depths=[1] * 4, dims=[4] * 4), width_factor=1.0,
                  kernel_sizes=(5, 5, 5, 5), small_kernel=3),
    decode_head=dict(type='FCNHead', in_channels=4, channels=4, num_convs=1, num_classes=150,
                     norm_cfg=norm_cfg))
train_dataloader = dict(
    batch_size=2, num_workers={workers}, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ADE20KDataset', data_root='{root}', reduce_zero_label=True,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[dict(type='LoadImageFromFile'{color}), dict(type='LoadAnnotations'),
                  dict(type='RandomCrop', crop_size=(32, 32)), dict(type='PackSegInputs')]))
val_dataloader = val_cfg = val_evaluator = test_cfg = None
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4))
randomness = dict(seed=0)
"""


def picture(root: Path) -> Path:
    return sorted((root / 'images/training').iterdir())[0]


def labels(root: Path) -> Path:
    return sorted((root / 'annotations/training').iterdir())[0]


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def as_png(path: Path, mode: str) -> Path:
    """Another kind of picture under the same name: decoders go by content."""
    kind = np.uint16 if mode == 'I;16' else np.uint8
    shape = (64, 80, 4) if mode == 'RGBA' else (64, 80)
    with path.open('wb') as file:
        Image.fromarray(np.full(shape, 40, kind)).save(file, format='PNG')
    return path


def write_text(path: Path) -> Path:
    path.write_text('<html>Quota exceeded</html>')
    return path


def relabel(path: Path, labels: np.ndarray) -> Path:
    cv2.imwrite(str(path), labels)
    return path


KINDS = {
    'unreadable': (lambda root: write_text(picture(root)), 'cannot be read'),
    'empty file': (lambda root: (picture(root).write_bytes(b''), picture(root))[1], 'is empty'),
    'truncated': (lambda root: truncate(picture(root)), 'truncated'),
    'truncated label map': (lambda root: truncate(labels(root)), 'truncated'),
    'unknown class': (
        lambda root: relabel(labels(root), np.full((64, 80), 180, np.uint8)),
        'class 179; there are 150',
    ),
    'other size': (
        lambda root: relabel(labels(root), np.ones((60, 80), np.uint8)),
        'a label map of 80×60, 80×64, the size of its picture, expected',
    ),
    'RGB label map': (
        lambda root: relabel(labels(root), np.ones((64, 80, 3), np.uint8)),
        'a label map of 80×64×3',
    ),
}
ODD = {
    '16-bit': (lambda root: as_png(picture(root), 'I;16'), 'more than 8 bits per channel'),
    'RGBA': (lambda root: as_png(picture(root), 'RGBA'), 'an alpha channel'),
    'grey': (lambda root: as_png(picture(root), 'L'), 'grey'),
}


@pytest.fixture
def seg(tmp_path):
    """Config and data of a tiny segmentor; `spoil` makes its first sample bad."""
    root = miniatures.write_ade20k(tmp_path / 'ade', size=(64, 80))

    def make(spoil=None, workers: int = 0, color: str = '', more: str = '') -> list[str]:
        bad = spoil(root) if spoil else None
        text = SEG
        for key, value in dict(root=root, workers=workers, color=color).items():
            text = text.replace('{%s}' % key, str(value))  # noqa: UP031
        (tmp_path / 'config.py').write_text(text + more)
        return [str(tmp_path / 'config.py')], bad

    return make


def fails(main, argv: list, capsys, status: int = 2) -> str:
    assert main([str(part) for part in argv]) == status
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    return captured.err.splitlines()[-1] if status == 2 else captured.out


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_stops_training_with_file_and_reason(seg, tmp_path, capsys, kind):
    config, bad = seg(KINDS[kind][0])
    said = fails(train_tool, [*config, '--work-dir', tmp_path / 'work'], capsys)
    assert said.startswith('error: ')
    assert str(bad) in said
    assert KINDS[kind][1] in said
    assert said.endswith(WAY_ON)
    said = fails(check_tool, [*config, '--workers', 1, '--split', 'train'], capsys, 1)
    assert f'{bad}: ' in said
    assert KINDS[kind][1] in said
    assert '4 samples, 1 bad' in said
    assert said.splitlines()[-1] == f'For each bad sample: {MEND}, {SKIP}'


def test_from_a_worker_it_is_one_line_too(seg, tmp_path, capsys):
    config, bad = seg(KINDS['truncated'][0], workers=2)
    said = fails(train_tool, [*config, '--work-dir', tmp_path / 'work'], capsys)
    assert said.startswith(f'error: {bad}: truncated')


@pytest.mark.parametrize('kind', ODD)
@pytest.mark.parametrize('policy', ['error', 'skip', 'warn'])
def test_odd_pictures_are_trained_on_and_told_of_once(seg, tmp_path, capsys, kind, policy):
    config, odd = seg(ODD[kind][0], workers=2 if policy == 'error' else 0)
    argv = [*config, '--work-dir', str(tmp_path / 'work'), '--on-bad-sample', policy]
    assert train_tool(argv) == 0
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    (told,) = re.findall(r'WARNING - odd, and used as it is loaded: (.*)', log)
    assert told.startswith(f'{odd}: {ODD[kind][1]}')
    (counted,) = re.findall(r'WARNING - (1 odd sample: .*)', log)
    assert counted.endswith(f'first: {odd}')
    assert not (tmp_path / 'work/bad_samples.jsonl').exists()
    capsys.readouterr()
    said = fails(check_tool, [*config, '--workers', 1], capsys, 0)
    assert f'train_dataloader: 1 odd: {ODD[kind][1]}' in said
    assert '4 samples, 0 bad' in said


def test_policy_warn_stops_at_what_the_loader_cannot_read_alone(seg, tmp_path, capsys):
    config, bad = seg(KINDS['other size'][0])
    argv = [*config, '--work-dir', str(tmp_path / 'work'), '--on-bad-sample', 'warn']
    assert train_tool(argv) == 0
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert f'{bad} (a label map of 80×60, 80×64' in log
    assert '1 odd sample: bad, and used all the same' in log
    write_text(bad)
    said = fails(train_tool, argv, capsys)
    assert said.startswith(f'error: {bad}: cannot be read')
    assert said.endswith(WAY_ON)


@pytest.mark.parametrize('workers', [0, 2])
def test_skipping_lists_and_goes_on(seg, tmp_path, capsys, workers):
    config, bad = seg(KINDS['truncated'][0], workers)  # one of four
    work = tmp_path / 'work'
    assert train_tool([*config, '--work-dir', str(work), '--on-bad-sample', 'skip']) == 0
    lines = [json.loads(line) for line in (work / 'bad_samples.jsonl').read_text().splitlines()]
    assert {line['file'] for line in lines} == {str(bad)}
    assert lines[0]['reason'].startswith('truncated')
    log = next(work.glob('*/*.log')).read_text()
    assert f'1 bad sample of 4 skipped so far, listed in {work}/bad_samples.jsonl' in log


class SwitchPipeline(Hook):
    """As mmdet's PipelineSwitchHook: a new pipeline before the second epoch, at NORMAL priority."""

    def before_train_epoch(self, runner) -> None:
        if runner.epoch == 1:
            self.sample = next(iter(innermost(runner.train_dataloader.dataset)))
            truncate(self.sample.folder)
            self.sample.pipeline = Compose([LoadImageFromFile()])


class Pictures(torch.utils.data.Dataset):
    """A picture through a pipeline, and the toy's data beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pipeline = folder, Compose([LoadImageFromFile()])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        self.pipeline(dict(img_path=str(self.folder)))
        return Data()[index]


def test_a_pipeline_that_a_hook_switches_is_checked(tmp_path):
    path = picture(miniatures.write_ade20k(tmp_path / 'ade'))
    runner = build_runner(
        tmp_path,
        train_dataloader=dict(
            batch_size=4, num_workers=0, dataset=Pictures(path),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        hooks=[SwitchPipeline(), dict(type='mmslak.BadSampleHook')],
    )  # fmt: skip
    with pytest.raises(BadSampleError, match='truncated'):
        runner.train()
    assert runner.epoch == 1


def test_too_many_bad_samples_stop(seg, tmp_path, capsys):
    def spoil(root: Path) -> None:
        for path in sorted((root / 'images/training').iterdir())[:3]:
            truncate(path)

    config, _ = seg(spoil)
    argv = [*config, '--work-dir', tmp_path / 'work', '--on-bad-sample', 'skip']
    said = fails(train_tool, argv, capsys)
    assert '3 of 4 training samples cannot be trained on, more than 2 and more than 1 %; ' in said
    assert str(tmp_path / 'work/bad_samples.jsonl') in said


def test_a_box_turned_around_and_a_missing_picture(tmp_path, capsys):
    root = miniatures.write_voc(tmp_path / 'voc')
    path = sorted((root / 'VOC2007/Annotations').iterdir())[0]
    tree = ElementTree.parse(path)
    box = tree.find('.//bndbox')
    box.find('xmin').text, box.find('xmax').text = box.find('xmax').text, box.find('xmin').text
    tree.write(path)
    text = """
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/voc0712.py',
          'mmdet::_base_/default_runtime.py', 'mmdet::_base_/schedules/schedule_1x.py']
model = dict(roi_head=dict(bbox_head=dict(num_classes=20)))
train_set = _base_.train_dataloader.dataset.dataset.datasets[0]
train_set.filter_cfg = dict()  # where small boxes are trained on
train_dataloader = dict(dataset=dict(_delete_=True, **train_set))
"""
    (tmp_path / 'config.py').write_text(text)
    argv = [tmp_path / 'config.py', '--split', 'train', '--workers', 1]
    argv += ['--out', tmp_path / 'bad.jsonl', '--cfg-options', f'data_root={root}/']
    said = fails(check_tool, argv, capsys, 1)
    assert f'{path.stem}.jpg: a box that is turned around, empty or not finite' in said
    (root / f'VOC2007/JPEGImages/{path.stem}.jpg').unlink()
    said = fails(check_tool, argv, capsys, 1)
    assert f'{path.stem}.jpg: no such file' in said
    assert len((tmp_path / 'bad.jsonl').read_text().splitlines()) == 1
    # VOCDataset reads sizes from the annotations, so that training comes as far as the loader.
    argv = [tmp_path / 'config.py', '--work-dir', tmp_path / 'work', '--no-validate']
    options = ['train_dataloader.num_workers=0', 'train_dataloader.batch_size=6']
    options += ['model.backbone.init_cfg=None', f'data_root={root}/']
    said = fails(train_tool, [*argv, '--cfg-options', *options], capsys)
    assert f'{path.stem}.jpg: no such file' in said


def test_whole_files_of_all_kinds_pass(tmp_path):
    rng = np.random.default_rng(0)
    content = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    for suffix in ('jpg', 'png', 'bmp', 'webp', 'tif', 'gif'):
        Image.fromarray(content).save(tmp_path / f'x.{suffix}')
        check_file(str(tmp_path / f'x.{suffix}'))
    with (tmp_path / 'x.jpg').open('ab') as file:
        file.write(b'appended by a camera')
    check_file(str(tmp_path / 'x.jpg'))
    check_file('s3://bucket/x.jpg')
    check_file(None)


def test_a_list_counts_files_once(tmp_path):
    several = SampleList(tmp_path / 'bad.jsonl')
    assert several.count() == 0
    for file in ('a', 'b', 'a'):
        several.add(file, 'truncated')
    assert several.count() == 2
    assert SampleList(tmp_path / 'bad.jsonl').count() == 2


def test_wrong_settings():
    with pytest.raises(ValueError, match='policy: expected one of error, skip, warn'):
        BadSampleHook('ignore')
    with pytest.raises(ValueError, match='max_fraction: expected a number in'):
        BadSampleHook(max_fraction=2)
    assert str(BadSampleError('a: b')) == 'a: b'


# ---------------------------------------------------------------- the default of the tool


@pytest.mark.parametrize(
    ('hooks', 'kind'),
    [
        ('', 'mmslak.SafeCheckpointHook'),
        ("default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=3))",
         'mmslak.SafeCheckpointHook'),
        ("default_hooks = dict(checkpoint=dict(type='Own'))", 'Own'),
    ],
)  # fmt: skip
def test_every_config_gets_it(hooks, kind):
    cfg = Config.fromstring(f'model = dict()\n{hooks}\n', '.py')
    enable_survival(cfg)
    enable_survival(cfg, 'skip')
    assert cfg.default_hooks.checkpoint.type == kind
    assert [hook.type for hook in cfg.custom_hooks] == [f'mmslak.{n}' for n in SURVIVAL]
    assert cfg.custom_hooks[0].policy == 'skip'
