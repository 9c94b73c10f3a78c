import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmslak.models import SLaK


class Segmentor(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.backbone = SLaK(arch)
        self.decode_head = nn.Conv2d(4, 4, 1)


def scales(model: nn.Module, **paramwise) -> dict[str, tuple[float, float]]:
    """{parameter: (learning rate, weight decay)} of the optimizer that a config builds."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='mmslak.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=paramwise,
        ),
    )
    return {
        name: (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for name in group['param_names']
    }


def published_id(name: str, layers: int, stage_wise: bool) -> int:
    """The table of the published recipe, written out: openmmlab.md, 'Learning-rate decay ids'."""
    if not name.startswith('backbone.'):
        return layers + 1
    parts = name.split('.')[1:]
    if parts[0] == 'downsample_layers':
        return 0 if stage_wise else {0: 0, 1: 2, 2: 3, 3: layers}[int(parts[1])]
    if parts[0] == 'stages':
        stage, block = int(parts[1]), int(parts[2])
        if stage_wise:
            return stage + 1
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: layers}[stage]
    return layers + 1


@pytest.mark.parametrize(('arch', 'layers'), [('tiny', 6), ('small', 12), ('base', 12)])
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_every_parameter_has_the_published_scale(arch, layers, decay_type):
    with torch.device('meta'):
        model = Segmentor(arch)
    got = scales(model, decay_type=decay_type, decay_rate=0.9, num_layers=layers)
    parameters = dict(model.named_parameters())
    assert got.keys() == parameters.keys()
    for name, parameter in parameters.items():
        depth = published_id(name, layers, decay_type == 'stage_wise')
        decay = 0.0 if parameter.ndim == 1 else 0.05
        assert got[name] == (pytest.approx(0.9 ** (layers + 1 - depth)), decay), name


def test_number_of_layers_is_the_backbones_when_absent():
    with torch.device('meta'):
        model = Segmentor('tiny')
    got = scales(model, decay_type='stage_wise', decay_rate=0.5)
    assert got['backbone.downsample_layers.3.1.weight'][0] == 0.5**7
    assert got['backbone.norm2.weight'] == (1.0, 0.0)
    assert got['decode_head.weight'] == (1.0, 0.05)


def test_frozen_parameters_are_left_out():
    model = Segmentor(dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]))
    model.decode_head.requires_grad_(False)
    got = scales(model, decay_type='layer_wise', decay_rate=0.9)
    assert not any(name.startswith('decode_head') for name in got)


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(decay_type='block_wise', decay_rate=0.9), 'decay_type: expected'),
        (dict(decay_type='layer_wise', decay_rate=1.5), 'decay_rate: expected a number in'),
        (dict(decay_type='layer_wise'), 'decay_rate: expected a number in'),
        (
            dict(decay_type='layer_wise', decay_rate=0.9, num_layers=7),
            r'num_layers: .*has 4, got 7',
        ),
        (dict(decay_type='layer_wise', decay_rate=0.9, norm_mult=0), "unknown key 'norm_mult'"),
    ],
)
def test_bad_settings(cfg, message):
    with pytest.raises(ValueError, match=message):
        scales(Segmentor(dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])), **cfg)


def test_a_backbone_without_depths_is_an_error():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(TypeError, match='Linear of Module has none'):
        scales(model, decay_type='layer_wise', decay_rate=0.9)
