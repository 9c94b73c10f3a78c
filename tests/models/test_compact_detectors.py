"""Detectors on a compact backbone: the same boxes, a step of training, and the command."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmslak.checkpoints.files import read_state_dict
from mmslak.cli import compact
from mmslak.sparsity import compact_, find_hidden_layers

pytest.importorskip('mmdet')

CONFIG = """
_base_ = 'mmslak::demo/{}_slak_digit_scenes.py'
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, depths=[1, 1, 1, 1], dims=[8, 12, 16, 24]),
        kernel_sizes=(9, 7, 5, 5),
        init_cfg=None,
    ),
    neck=dict(in_channels=[8, 12, 16, 24]),
)
"""
WIDTHS = [[20], [48], [1], [57]]
KINDS = ('faster_rcnn', 'cascade_mask_rcnn')


def batch(masks: bool) -> dict:
    """Two pictures of different sizes, with two objects each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for height, width in ((96, 128), (128, 96)):
        inputs.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
        size = (height, width)
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
        )
        objects = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 56, 56], [40, 30, 90, 80]]), labels=torch.tensor([1, 7])
        )
        if masks:
            drawn = torch.zeros(2, height, width, dtype=torch.uint8)
            drawn[0, 8:56, 8:56] = drawn[1, 30:80, 40:90] = 1
            objects.masks = BitmapMasks(drawn.numpy(), height, width)
        sample.gt_instances = objects
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def loss(model: nn.Module, data: dict) -> torch.Tensor:
    data = model.data_preprocessor(copy.deepcopy(data), training=True)
    return model.parse_losses(model(**data, mode='loss'))[0]


@torch.no_grad()
def predictions(model: nn.Module, data: dict) -> list[InstanceData]:
    model.eval()
    data = model.data_preprocessor(copy.deepcopy(data), training=False)
    return [one.pred_instances for one in model(**data, mode='predict')]


def assert_same_boxes(found: list[InstanceData], expected: list[InstanceData]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 0
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.bboxes, other.bboxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)
        if 'masks' in other:
            assert torch.equal(one.masks, other.masks)


def in_float64(detector: nn.Module) -> nn.Module:
    """Lets the backbone calculate in float64, since rounding could change which of two boxes goes.

    The rest stays in float32, which mmcv's operators need on a CPU.
    """
    backbone = detector.backbone.double()
    backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    backbone.register_forward_hook(lambda module, inputs, maps: tuple(y.float() for y in maps))
    return detector


def step(model: nn.Module, data: dict) -> None:
    """One step of training; every parameter of hidden units has to move."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    value = loss(model, data)
    value.backward()
    assert value.isfinite()
    parameters = {n: p for n, p in model.backbone.named_parameters() if 'pwconv' in n}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    assert len(parameters) == 16
    assert not [name for name, p in parameters.items() if torch.equal(p, before[name])]


@pytest.fixture(params=KINDS)
def trained(request, tmp_path, monkeypatch):
    """A detector after a step, many of whose hidden units have died since, and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'whole.py').write_text(CONFIG.format(request.param))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile('whole.py').model)
    model.init_weights()
    model, data = in_float64(model), batch('mask' in request.param)
    step(model, data)
    parameters = dict(model.backbone.named_parameters())
    with torch.no_grad():
        widths = (units for row in WIDTHS for units in row)
        for layer, units in zip(find_hidden_layers(model.backbone), widths, strict=True):
            parameters[f'{layer.first}.weight'][units:] = 0
            parameters[f'{layer.first}.bias'].normal_()
    return model, data


def test_a_compact_detector_finds_the_same_and_trains(trained):
    model, data = trained
    expected = predictions(model, data)
    assert list(compact_(model).values()) == [20, 48, 1, 57]
    assert_same_boxes(predictions(model, data), expected)
    step(model, data)


def test_the_command_writes_a_detector_that_finds_the_same_and_trains(trained):
    model, data = trained
    expected = predictions(model, data)
    torch.save({'state_dict': model.state_dict()}, 'run.pth')
    assert compact.main(['run.pth', 'small.pth', '--config', 'whole.py']) == 0
    cfg = Config.fromfile('small.py').model
    assert cfg.backbone.hidden_channels == WIDTHS
    small = MODELS.build(cfg)
    small.init_weights()
    saved = read_state_dict('small.pth')
    own = small.backbone.state_dict()
    assert all(torch.equal(t, saved[f'backbone.{n}'].to(t.dtype)) for n, t in own.items())
    in_float64(small).load_state_dict(saved)
    assert_same_boxes(predictions(small, data), expected)
    step(small, data)
