"""`init_model` and `inference_model`, beside the libraries' own functions."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmslak import apis
from mmslak.apis import inference_model, init_model
from mmslak.apis.model import normalisation, pad_values
from mmslak.errors import CheckpointError, UserError
from mmslak.ops import DepthwiseConv2d
from tests.golden import ROOT

SEGMENTOR = ROOT / 'configs/demo/upernet_slak_digit_scenes.py'
DETECTOR = ROOT / 'configs/demo/faster_rcnn_slak_digit_scenes.py'
CLASSIFIER = ROOT / 'configs/demo/slak_digits.py'
TINY = {'model.backbone.arch.dims': [8, 16, 24, 32]}
TINY_SEGMENTOR = {
    **TINY,
    'model.decode_head.channels': 8,
    'model.decode_head.in_channels': [8, 16, 24, 32],
    'model.auxiliary_head.in_channels': 24,
    'model.auxiliary_head.channels': 8,
}
CLASSES = tuple('abcdefghijk')


@pytest.fixture(scope='module')
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('picture') / 'a.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a segmentor as a run writes it."""
    torch.manual_seed(0)
    model = init_model(SEGMENTOR, device='cpu', cfg_options=TINY_SEGMENTOR)
    path = tmp_path_factory.mktemp('segmentor') / 'iter_1.pth'
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def segmentor(checkpoint) -> nn.Module:
    return init_model(SEGMENTOR, checkpoint, 'cpu', TINY_SEGMENTOR)


def test_a_model_of_a_checkpoint(segmentor, checkpoint):
    assert not segmentor.training
    assert segmentor.dataset_meta['classes'] == CLASSES
    assert segmentor.cfg.model.decode_head.channels == 8
    saved = torch.load(checkpoint, weights_only=True)['state_dict']
    assert all(torch.equal(value, saved[name]) for name, value in segmentor.state_dict().items())
    assert any(parameter.requires_grad for parameter in segmentor.parameters())


def test_a_config_object_stays_as_it_is():
    cfg = Config.fromfile(SEGMENTOR)
    before = cfg.to_dict()
    model = init_model(cfg, device='cpu', cfg_options=TINY_SEGMENTOR)
    assert model.cfg.model.decode_head.channels == 8
    assert cfg.to_dict() == before
    assert len(model.dataset_meta['classes']) == 11  # of the config's test set


def test_pictures_as_files_and_arrays(segmentor, picture):
    of_file = inference_model(segmentor, picture)
    assert of_file.pred_sem_seg.data.shape == (1, 64, 96)
    array = cv2.imread(str(picture))
    several = inference_model(segmentor, [array, str(picture)])
    assert len(several) == 2
    for sample in several:
        assert torch.equal(sample.pred_sem_seg.data, of_file.pred_sem_seg.data)


def test_mmseg_takes_the_model(checkpoint, picture):
    from mmseg.apis import inference_model as of_mmseg

    segmentor = init_model(SEGMENTOR, checkpoint, 'cpu', TINY_SEGMENTOR)
    ours = inference_model(segmentor, picture)
    sample = of_mmseg(segmentor, str(picture))
    assert torch.equal(sample.pred_sem_seg.data, ours.pred_sem_seg.data)


def test_a_classifier(picture):
    options = {**TINY, 'model.head.in_channels': 32}
    model = init_model(CLASSIFIER, device='cpu', cfg_options=options)
    sample = inference_model(model, picture)
    assert sample.pred_score.shape == (10,)
    (same,) = inference_model(model, [cv2.imread(str(picture))])
    assert torch.equal(sample.pred_score, same.pred_score)
    from mmpretrain.apis import ImageClassificationInferencer

    (found,) = ImageClassificationInferencer(model, pretrained=False)(str(picture))
    assert found['pred_scores'] == pytest.approx(sample.pred_score.numpy())


def test_a_detector_that_mmdet_takes(picture):
    pytest.importorskip('mmcv._ext')
    from mmdet.apis import inference_detector

    model = init_model(DETECTOR, device='cpu', cfg_options={'model.test_cfg.rcnn.score_thr': 0.05})
    sample = inference_model(model, cv2.imread(str(picture)))
    assert len(sample.pred_instances.scores)
    theirs = inference_detector(model, str(picture))
    assert torch.equal(sample.pred_instances.bboxes, theirs.pred_instances.bboxes)
    assert len(model.dataset_meta['classes']) == 10


def test_a_config_with_accelerate_hook():
    cfg = Config.fromfile(CLASSIFIER)
    cfg.model.backbone = dict(type='ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16]))
    cfg.model.head.in_channels = 16
    cfg.custom_hooks = [dict(type='EMAHook'), dict(type='mmslak.AccelerateHook')]
    model = init_model(cfg, device='cpu')
    assert sum(isinstance(module, DepthwiseConv2d) for module in model.modules()) == 2


def test_wrong_input_is_named(segmentor, checkpoint, tmp_path):
    with pytest.raises(UserError, match=r'gone\.jpg: no such file'):
        inference_model(segmentor, 'gone.jpg')
    with pytest.raises(UserError, match=r'shape \(64, 96\): expected .* \(height, width, 3\), BGR'):
        inference_model(segmentor, np.zeros((64, 96), np.uint8))
    with pytest.raises(UserError, match=r'config gone\.py not found'):
        init_model('gone.py')
    with pytest.raises(UserError, match=r'nearest is model\.decode_head\.channels'):
        init_model(SEGMENTOR, device='cpu', cfg_options={'model.decode_head.chanels': 8})
    with pytest.raises(UserError, match='does not fit the config'):
        init_model(SEGMENTOR, checkpoint, 'cpu', TINY_SEGMENTOR | {'model.decode_head.channels': 9})
    (tmp_path / 'page.pth').write_text('<html>')
    with pytest.raises(CheckpointError, match=r'page\.pth'):
        init_model(SEGMENTOR, tmp_path / 'page.pth', 'cpu', TINY_SEGMENTOR)


@pytest.mark.parametrize(
    ('preprocessor', 'expected'),
    [
        (None, (123.675, 58.395, 'RGB')),
        (dict(type='DetDataPreprocessor', pad_size_divisor=32), (0, 1, 'BGR')),  # as YOLOX has it
        (dict(mean=[1, 2, 3], std=[4, 5, 6]), (1, 4, 'BGR')),
        (dict(mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=True), (1, 4, 'RGB')),
        (dict(to_rgb=True), (0, 1, 'RGB')),
    ],
)
def test_normalisation(preprocessor, expected):
    model = {} if preprocessor is None else dict(data_preprocessor=preprocessor)
    norm = normalisation(Config(dict(model=model)))
    assert (norm['mean'][0], norm['std'][0], norm['channels']) == expected


def test_normalisation_in_a_pipeline():
    step = dict(type='mmcv.Normalize', mean=[1, 2, 3], std=[4, 5, 6])
    cfg = Config(dict(model=dict(data_preprocessor=dict(pad_val=0)), test_pipeline=[step]))
    assert normalisation(cfg) == dict(mean=[1, 2, 3], std=[4, 5, 6], channels='RGB')
    cfg.test_pipeline[0].to_rgb = False
    assert normalisation(cfg)['channels'] == 'BGR'


def test_pad_values():
    """114 as mmdet's configs of YOLOX and RTMDet have it; Pad comes before the preprocessor."""
    preprocessor = dict(mean=[100.0, 50.0, 10.0], std=[2.0, 4.0, 8.0], pad_value=3)
    cfg = Config(dict(model=dict(data_preprocessor=preprocessor), test_pipeline=[]))
    assert pad_values(cfg) == [3, 3, 3]
    pad = dict(type='Pad', size_divisor=32, pad_val=dict(img=(114.0, 114.0, 122.0)))
    cfg.test_pipeline = [dict(type='Resize'), pad]
    assert pad_values(cfg) == [7, 16, 14]
    cfg.model.data_preprocessor.bgr_to_rgb = True
    assert pad_values(cfg) == [11, 16, 13]
    cfg.test_pipeline[1].pad_val = 10
    assert pad_values(cfg) == [-45, -10, 0]
    cfg.test_pipeline.insert(1, dict(type='Normalize', mean=[1] * 3, std=[2] * 3))
    assert pad_values(cfg) == [10, 10, 10]
    assert pad_values(Config(dict(model={}))) == [0, 0, 0]


def test_importing_the_names_is_cheap():
    code = 'import sys, mmslak.apis; print(mmslak.apis.__all__, "torch" in sys.modules)'
    command = [sys.executable, '-c', code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == f'{apis.__all__} False\n'
    with pytest.raises(AttributeError, match="has no attribute 'init_modl'"):
        apis.init_modl  # noqa: B018
