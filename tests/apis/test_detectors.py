"""Whole detectors as ONNX graphs: what the command writes is what onnxruntime finds."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from torch import nn

from mmslak.analysis.detections import Agreement, Detections, compare
from mmslak.apis import detectors
from mmslak.apis.model import build_model, read_model_config
from mmslak.cli.export import main
from mmslak.errors import UserError
from tests.golden import ROOT

FASTER = ROOT / 'configs/demo/faster_rcnn_slak_digit_scenes.py'
CASCADE = ROOT / 'configs/demo/cascade_mask_rcnn_slak_digit_scenes.py'
RETINANET = ROOT / 'configs/demo/retinanet_slak_digit_scenes.py'


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """Pictures with bright squares on something dark, of two forms; none of them is square."""
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for name, shape in (('a.png', (120, 90, 3)), ('b.jpg', (64, 100))):
        pixels = rng.integers(0, 60, shape, dtype=np.uint8)
        for row, column in ((8, 12), (30, 44)):
            pixels[row : row + 24, column : column + 24] += 180
        Image.fromarray(pixels).save(folder / name)
    return folder


def outspoken(config: Path, folder: Path) -> Path:
    """A checkpoint whose heads answer: random as they are begun, all scores would be alike."""
    torch.manual_seed(0)
    model = build_model(read_model_config(str(config)))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if re.search('cls|rpn_conv|conv_logits|reg|obj', name) and hasattr(module, 'weight'):
            # Not so much of the proposals' scores that the sigmoid makes them alike.
            wide = 3 if re.search('(fc|retina|atss|conv)_cls|logits', name) else 0.5
            nn.init.normal_(module.weight, std=wide / module.weight[0].numel() ** 0.5)
            if re.search('level_conv|atss_cls', name):  # which begin with scores near 0.01
                nn.init.zeros_(module.bias)
    path = folder / f'{config.stem}.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


# ---------------------------------------------------------------- without mmdeploy


def test_without_mmdeploy_one_line_says_what_to_type(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors, 'find_spec', lambda name: None)
    out = tmp_path / 'x.onnx'
    more = ['--images', str(photos), '--out', str(out)]
    assert main([str(FASTER), 'none', '--to', 'onnx', *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r'error: a whole detector is exported by mmdeploy.*pip install', line)
    assert '--backbone-only' in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kind', ['torchscript', 'safetensors'])
def test_a_whole_detector_is_no_torchscript(kind, tmp_path, capsys):
    assert main([str(FASTER), 'none', '--to', kind, '--out', str(tmp_path / 'x')]) == 2
    assert 'onnx alone; --backbone-only' in capsys.readouterr().err


def test_pictures_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors, 'find_spec', lambda name: True)
    assert main([str(FASTER), 'none', '--to', 'onnx', '--out', str(tmp_path / 'x')]) == 2
    assert 'error: --images FOLDER: a whole detector is checked' in capsys.readouterr().err


def test_soft_suppression_is_refused():
    settings = dict(score_thr=0.1, nms=dict(type='soft_nms', iou_threshold=0.5))
    says = r'nms\.type=soft_nms cannot be exported; .*--cfg-options model\.test_cfg'
    for test_cfg, place in ((settings, r'\.nms'), (dict(rcnn=settings), r'\.rcnn\.nms')):
        with pytest.raises(UserError, match=says + place + r'\.type=nms'):
            detectors.check_model(SimpleNamespace(test_cfg=test_cfg))
    detectors.check_model(SimpleNamespace(test_cfg=dict(settings, nms=dict(type='nms'))))


def test_masks_of_one_stage_are_refused():
    model = SimpleNamespace(test_cfg=dict(score_thr=0.1), with_mask=True, mask_head=nn.Identity())
    with pytest.raises(UserError, match='masks of one-stage detectors'):
        detectors.check_model(model)


def test_mmdet_finds_the_masks_of_its_labels():
    """Probabilities on the heads' grid, their mean; otherwise mmdet pastes them."""
    cfg = read_model_config(str(CASCADE))
    cfg.model.test_cfg.rcnn.max_per_img = 3
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = build_model(cfg)
    picture = torch.randn(1, 3, 64, 96)
    boxes, _, labels, masks = detectors.find(model, picture)
    assert masks.shape == (3, 28, 28)
    (plain,) = model(picture, [detectors._sample(picture)], mode='predict')
    pasted = plain.pred_instances.masks
    assert pasted.shape == (3, 64, 96)
    assert torch.equal(plain.pred_instances.bboxes, boxes)
    features = model.extract_feat(picture)
    rois = torch.cat([torch.zeros(3, 1), boxes], 1)
    heads = [model.roi_head._mask_forward(i, features, rois)['mask_preds'] for i in range(3)]
    mean = sum(head.sigmoid() for head in heads) / 3
    torch.testing.assert_close(masks, mean[range(3), labels])


# ---------------------------------------------------------------- with mmdeploy

needs_mmdeploy = pytest.mark.skipif(
    detectors.find_spec('mmdeploy') is None, reason='mmdeploy is not installed'
)


@needs_mmdeploy
@pytest.mark.parametrize('config', [FASTER, CASCADE, RETINANET], ids=lambda path: path.stem)
def test_export_agrees_and_runs_without_torch(config, photos, tmp_path, capsys):
    import onnx

    graph = tmp_path / 'x.onnx'
    more = ['--images', str(photos), '--out', str(graph), '--shape', '96', '128']
    checkpoint = outspoken(config, tmp_path)
    status = main([str(config), str(checkpoint), '--to', 'onnx', *more])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    told = re.findall(r'^(\d+)×(\d+): (\d+) detections? in 2 pictures', printed.out, re.M)
    assert [size[:2] for size in told] == [('96', '128'), ('128', '224')]
    assert all(int(count) >= 2 for *_, count in told)
    assert ('masks within' in printed.out) == (config == CASCADE)

    nodes = onnx.load(graph).graph.node
    assert {node.domain for node in nodes} == {''}
    operators = {node.op_type for node in nodes}
    assert {'Conv', 'NonMaxSuppression'} <= operators
    assert ('RoiAlign' in operators) == (config != RETINANET)

    found = tmp_path / 'found.json'
    script = [str(ROOT / 'benchmarks/onnx_detector.py'), str(graph), str(photos)]
    ended = subprocess.run(
        [sys.executable, *script, '--scale', '128', '128', '--out', str(found)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert 'PyTorch loaded: False' in ended.stdout
    entries = json.loads(found.read_text())
    assert {entry['image_id'] for entry in entries} == {'a.png', 'b.jpg'}
    assert all(('segmentation' in entry) == (config == CASCADE) for entry in entries)


@needs_mmdeploy
def test_more_pairs_of_anchor_and_class_than_mmdet_keeps(photos, tmp_path, capsys):
    """As of a detector that is not sure of classes: where one suits, all do, nearly as well."""
    checkpoint = outspoken(RETINANET, tmp_path)
    state = torch.load(checkpoint)
    weight = state['state_dict']['bbox_head.retina_cls.weight']
    by_class = weight.view(-1, 10, *weight.shape[1:])
    by_class[:] = by_class[:, :1] * torch.linspace(0.9, 1.1, 10)[:, None, None, None]
    torch.save(state, checkpoint)
    more = ['--images', str(photos), '--out', str(tmp_path / 'x.onnx'), '--shape', '64', '64']
    settings = [f'model.test_cfg.{text}' for text in ('nms_pre=50', 'max_per_img=1000')]
    command = [str(RETINANET), str(checkpoint), '--to', 'onnx', *more, '--cfg-options', *settings]
    assert main(command) == 0, capsys.readouterr().err


YOLOX = f"""
_base_ = {str(RETINANET)!r}
model = dict(
    _delete_=True, type='YOLOX',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32, pad_value=114.0),
    backbone=_base_.model.backbone,
    neck=dict(type='FPN', in_channels=[64, 128, 256], out_channels=8, num_outs=3),
    bbox_head=dict(
        type='YOLOXHead', num_classes=10, in_channels=8, feat_channels=8, stacked_convs=1,
        strides=[8, 16, 32], act_cfg=dict(type='ReLU')),
    test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.9)))
"""


@needs_mmdeploy
def test_a_detector_without_normalisation_and_limit(photos, tmp_path, capsys):
    """YOLOX: it takes raw values, finds as much as there is, and a box in its best class alone."""
    import onnx

    config, graph = tmp_path / 'yolox.py', tmp_path / 'x.onnx'
    config.write_text(YOLOX)
    more = ['--images', str(photos), '--out', str(graph), '--shape', '90', '128']
    assert main([str(config), str(outspoken(config, tmp_path)), '--to', 'onnx', *more]) == 0
    told = re.findall(r'^(\d+)×(\d+): (\d+) detections', capsys.readouterr().out, re.M)
    assert [size[:2] for size in told] == [('96', '128'), ('128', '224')]
    assert all(int(count) > 2 * 100 for *_, count in told)  # mmdeploy's limit for each picture
    values = {entry.key: json.loads(entry.value) for entry in onnx.load(graph).metadata_props}
    expected = dict(mean=[0] * 3, std=[1] * 3, channels='BGR', size_divisor=32)
    assert dict(expected, pad_value=[114] * 3).items() <= values.items()


ATSS = f"""
_base_ = {str(RETINANET)!r}
model = dict(
    type='ATSS',
    bbox_head=dict(
        _delete_=True, type='ATSSHead', num_classes=10, in_channels=64, stacked_convs=1,
        feat_channels=64,
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1,
            strides=[8, 16, 32, 64]),
        reg_decoded_bbox=True),
    test_cfg=dict(nms_pre=50, score_thr=0.45, max_per_img=60))
"""


@needs_mmdeploy
def test_centerness_multiplies_what_is_above_the_threshold(photos, tmp_path, monkeypatch, capsys):
    """mmdet keeps what is below it afterwards, and nms_pre counts pairs of anchor and class."""
    lowest = []

    def note(got: Detections, expected: Detections, *more: object) -> Agreement:
        lowest.append(float(expected.scores.min()))
        return compare(got, expected, *more)

    monkeypatch.setattr('mmslak.cli.export.compare', note)
    config = tmp_path / 'atss.py'
    config.write_text(ATSS)
    more = ['--images', str(photos), '--out', str(tmp_path / 'x.onnx'), '--shape', '96', '128']
    checkpoint = outspoken(config, tmp_path)
    assert main([str(config), str(checkpoint), '--to', 'onnx', *more]) == 0
    told = re.findall(r': (\d+) detections in', capsys.readouterr().out)
    assert [int(count) > 20 for count in told] == [True, True]
    assert len(lowest) == 4
    assert max(lowest) < 0.4


@needs_mmdeploy
def test_sides_that_do_not_fit_name_the_option(photos, tmp_path, monkeypatch, capsys):
    def refuse(model: nn.Module, picture: torch.Tensor) -> None:
        raise RuntimeError('Sizes of tensors must match')

    monkeypatch.setattr(detectors, 'find', refuse)
    more = ['--images', str(photos), '--out', str(tmp_path / 'x.onnx')]
    assert main([str(RETINANET), 'none', '--to', 'onnx', *more]) == 2
    says = capsys.readouterr().err
    assert 'does not run on pictures of 224×224: RuntimeError: Sizes of tensors must match' in says
    assert 'pad_size_divisor' not in says
    more += ['--shape', '90', '128', '--cfg-options', 'model.data_preprocessor.pad_size_divisor=1']
    assert main([str(RETINANET), 'none', '--to', 'onnx', *more]) == 2
    assert '--cfg-options model.data_preprocessor.pad_size_divisor=32' in capsys.readouterr().err


@needs_mmdeploy
def test_export_that_finds_something_else_leaves_no_file(photos, tmp_path, monkeypatch, capsys):
    find = detectors.find
    monkeypatch.setattr(detectors, 'find', lambda model, x: moved(find(model, x)))
    graph = tmp_path / 'x.onnx'
    more = ['--images', str(photos), '--out', str(graph), '--shape', '64', '64']
    checkpoint = outspoken(RETINANET, tmp_path)
    assert main([str(RETINANET), str(checkpoint), '--to', 'onnx', *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r'error: .*x\.onnx: a\.png at 64×64: PyTorch finds class \d', error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name]


def moved(found: tuple) -> tuple:
    return (found[0] + 5, *found[1:])


@needs_mmdeploy
def test_pictures_without_objects_check_nothing(photos, tmp_path, capsys):
    option = 'model.test_cfg.rcnn.score_thr=0.999'
    more = ['--images', str(photos), '--out', str(tmp_path / 'x.onnx'), '--cfg-options', option]
    assert main([str(FASTER), 'none', '--to', 'onnx', *more]) == 2
    assert re.search(r'finds nothing in 2 pictures of 224×224.*objects', capsys.readouterr().err)


@needs_mmdeploy
def test_what_mmdeploy_cannot_do_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r'^mmdeploy cannot export Linear: '):
        detectors.to_onnx(nn.Linear(3, 3), torch.zeros(1, 3, 4, 4), tmp_path / 'x.onnx')
