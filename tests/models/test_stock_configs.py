"""SLaK in stock configs of mmseg and mmdet: one line of the config changed, and it trains."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

import mmslak  # noqa: F401

CHANNELS = [8, 12, 16, 20]
BACKBONE = dict(
    _delete_=True,
    type='mmslak.SLaK',
    arch=dict(depths=[1, 1, 1, 1], dims=CHANNELS),
    width_factor=1.0,
    kernel_sizes=(13, 11, 9, 7),
    layer_scale_init_value=1.0,
)
SIZE = 64

# Stock file: what has to change beside the backbone, because channels or levels differ.
SEGMENTORS = {
    '_base_/models/upernet_swin.py': dict(
        decode_head=dict(in_channels=CHANNELS), auxiliary_head=dict(in_channels=CHANNELS[2])
    ),
    '_base_/models/segformer_mit-b0.py': dict(decode_head=dict(in_channels=CHANNELS)),
}
FPN = dict(neck=dict(in_channels=CHANNELS))
# 512 regions a picture are most of the test's time and no more of a test.
RCNN = dict(FPN, train_cfg=dict(rcnn=dict(sampler=dict(num=16))))
DETECTORS = {
    '_base_/models/faster-rcnn_r50_fpn.py': RCNN,
    '_base_/models/mask-rcnn_r50_fpn.py': RCNN,
    '_base_/models/retinanet_r50_fpn.py': FPN,
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': FPN,
    'atss/atss_r50_fpn_1x_coco.py': FPN,
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py': dict(
        backbone=dict(BACKBONE, out_indices=(1, 2, 3)), neck=dict(in_channels=CHANNELS[1:])
    ),
}


def build(tmp_path, scope: str, stock: str, changes: dict) -> torch.nn.Module:
    """The stock model with SLaK as its backbone, as a user's config would have it."""
    model = copy.deepcopy({'backbone': BACKBONE, **changes})
    file = tmp_path / 'config.py'
    file.write_text(f"_base_ = ['{scope}::{stock}']\nmodel = {model!r}\n")
    cfg = Config.fromfile(file)
    assert 'custom_imports' not in cfg
    init_default_scope(scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def assert_trains(model: torch.nn.Module, batch: dict) -> None:
    """One optimizer step: finite losses, and every weight of the backbone's stages moves."""
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    # Without weight decay AdamW moves a weight by the learning rate if it has a gradient, or not.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = model.train().train_step(batch, OptimWrapper(optimizer))
    assert losses
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    still = [
        name
        for name, p in model.backbone.named_parameters()
        if torch.equal(p, before[name]) and name.startswith(('stages', 'downsample_layers'))
    ]
    assert not still


@pytest.mark.parametrize('stock', SEGMENTORS)
def test_segmentor_trains(tmp_path, stock):
    torch.manual_seed(0)
    model = build(tmp_path, 'mmseg', stock, SEGMENTORS[stock])
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        labels = PixelData(data=torch.randint(0, 19, (1, SIZE, SIZE)))
        samples.append(SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(SIZE, SIZE))))
    model.data_preprocessor.size = (SIZE, SIZE)
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in samples]
    assert_trains(model, dict(inputs=images, data_samples=samples))


@pytest.mark.parametrize('stock', DETECTORS)
def test_detector_trains(tmp_path, stock):
    torch.manual_seed(0)
    model = build(tmp_path, 'mmdet', stock, DETECTORS[stock])
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])
    masks = np.zeros((2, SIZE, SIZE), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    samples = []
    for _ in range(2):
        shape = dict(
            img_shape=(SIZE, SIZE),
            ori_shape=(SIZE, SIZE),
            scale_factor=(1.0, 1.0),
            batch_input_shape=(SIZE, SIZE),
        )
        instances = InstanceData(bboxes=boxes.clone(), labels=torch.tensor([3, 7]))
        if getattr(model, 'with_mask', False):
            instances.masks = BitmapMasks(masks, SIZE, SIZE)
        samples.append(DetDataSample(gt_instances=instances, metainfo=shape))
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in samples]
    assert_trains(model, dict(inputs=images, data_samples=samples))
