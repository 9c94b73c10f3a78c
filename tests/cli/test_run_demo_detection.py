"""The detection demo: a few real steps of the whole, and its judgement without any training."""

import importlib.util
import json
import re

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmslak.cli import run_demo
from mmslak.cli import run_demo_detection as demo
from tests import forks
from tests.cli.test_demo_page import check_addresses


def test_quick_demo_runs_and_then_skips(quick_demo, monkeypatch, capsys):
    # An edit of the sources between the two runs, by someone at work on them, is not the point.
    monkeypatch.setattr(run_demo, 'sources', lambda: 'unchanged')
    monkeypatch.setattr(run_demo, 'subprocess', forks.SUBPROCESS)
    work = quick_demo / 'work'
    arguments = ['--quick', '--data', str(quick_demo / 'data'), '--work-dir', str(work)]
    status = demo.main(arguments)
    output = capsys.readouterr()
    assert status == 0, output
    for metric in demo.BARS:
        assert re.search(rf'^Held-out scenes: {metric} [01]\.\d+ ', output.out, re.MULTILINE)
    assert output.out.count('as after pre-training') == 2
    picture = np.asarray(Image.open(work / 'digit_boxes_and_masks.png'))
    assert picture.min() < 50
    assert picture.max() > 200
    assert 'Detection: two detectors' in (work / 'index.html').read_text()
    assert 'digit_boxes_and_masks.png' in check_addresses(work / 'index.html')
    # Both backbones came from the pretraining run, by way of the config's own variable.
    for detector in ('faster_rcnn', 'cascade_mask_rcnn'):
        log = (work / detector / 'train.log').read_text()
        assert re.search(r'slak_digits/epoch_1\.pth: \d+ of \d+ tensors', log)

    assert demo.main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count('done before') == 4
    scores = [line for line in output.out.splitlines() if line.startswith('Held-out')]
    assert scores == [line for line in again.splitlines() if line.startswith('Held-out')]


@pytest.mark.parametrize(
    ('scores', 'status', 'message'),
    [
        ((0.51, 0.51, 0.41), 0, ''),
        ((0.49, 0.51, 0.41), 1, 'pascal_voc/mAP'),
        ((0.51, 0.49, 0.41), 1, 'coco/bbox_mAP_50'),
        ((0.51, 0.51, 0.39), 1, 'coco/segm_mAP_50'),
    ],
)
def test_exit_status_tells_whether_the_bars_are_met(monkeypatch, capsys, scores, status, message):
    monkeypatch.setattr(demo, 'run', lambda args: dict(zip(demo.BARS, scores, strict=True)))
    assert demo.main([]) == status
    assert message in capsys.readouterr().err
    assert demo.main(['--quick']) == 0  # scores of a quick run are not judged


def test_a_failed_step_is_exit_status_2(monkeypatch, capsys):
    def run(args):
        raise run_demo.DemoError('mmslak train failed')

    monkeypatch.setattr(demo, 'run', run)
    assert demo.main([]) == 2
    assert 'mmslak train failed' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['mmdet', 'mmcv._ext'])
def test_missing_libraries_are_told_before_anything_is_done(tmp_path, monkeypatch, capsys, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda n, *args: None if n == name else find(n, *args)
    )
    assert demo.main([f'--data={tmp_path / "data"}', f'--work-dir={tmp_path / "work"}']) == 2
    error = capsys.readouterr().err
    assert f'there is no {name}' in error
    assert 'make demo-detection' in error
    assert list(tmp_path.iterdir()) == []


def test_truth_in_the_picture_is_that_of_the_scenes(tmp_path):
    """Boxes and masks are read back from COCO's file as the other trees hold them."""
    from mmslak.datasets import make_digit_scenes

    make_digit_scenes(tmp_path / 'd', train=1, test=2, size=80, train_digits=10, test_digits=10)
    truths = demo.truths(tmp_path / 'd/coco')
    ade = tmp_path / 'd/ade/annotations/validation'
    assert sorted(truths) == [2, 3]
    for number, digits in truths.items():
        labels = np.asarray(Image.open(ade / f'ADE_val_{number - 1:08d}.png'))
        assert digits
        for digit in digits:
            rows, columns = np.nonzero(digit['mask'])
            x1, y1, x2, y2 = digit['box']
            assert (columns.min(), rows.min(), columns.max(), rows.max()) == (
                x1,
                y1,
                x2 - 1,
                y2 - 1,
            )
            # COCO's polygons fill the hole of a zero.
            assert set(labels[digit['mask'] > 0]) <= {1, digit['label'] + 2}
            assert (labels[digit['mask'] > 0] == digit['label'] + 2).mean() > 0.5


@pytest.mark.parametrize('with_masks', [True, False])
def test_predictions_above_the_threshold_are_drawn(tmp_path, with_masks):
    import mmengine
    import torch
    from pycocotools import mask

    whole = np.zeros((2, 80, 80), np.uint8)
    whole[0, 10:20, 30:40] = 1
    instances = dict(
        labels=torch.tensor([7, 3]),
        bboxes=torch.tensor([[30.0, 10, 40, 20], [0, 0, 5, 5]]),
        scores=torch.tensor([0.9, 0.4]),
    )
    if with_masks:
        instances['masks'] = [mask.encode(np.asfortranarray(m)) for m in whole]
    file = tmp_path / 'predictions.pkl'
    mmengine.dump([dict(img_path='coco/val2017/000000000601.jpg', pred_instances=instances)], file)
    ((number, (digit,)),) = demo.predictions(file).items()
    assert number == 601
    assert (digit['label'], digit['box']) == (7, [30, 10, 40, 20])
    assert np.array_equal(digit['mask'], whole[0]) if with_masks else digit['mask'] is None


def test_detectors_start_from_the_demo_of_segmentation():
    """One backbone in all of them; the segmentor's checkpoint and zeros are the detectors'."""
    other = Config.fromfile(run_demo.SCENES)
    for config in (demo.FASTER, demo.CASCADE):
        cfg = Config.fromfile(config)
        assert cfg.model.backbone == other.model.backbone
        assert cfg.custom_hooks == other.custom_hooks
    sets = json.dumps(Config.fromfile(demo.CASCADE).model.roi_head.bbox_head)
    assert sets.count('GIoULoss') == 3
