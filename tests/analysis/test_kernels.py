"""Large kernels: found once each, and fused to what the layer computes."""

import pytest
import torch
from torch import nn

from mmslak.analysis.kernels import large_kernel_layers, layer_kernels
from mmslak.analysis.pictures import draw_fused, overlay_field
from mmslak.models import PeLK, SLaK
from mmslak.ops import DepthwiseConv2d

ARCH = dict(depths=[1, 2], dims=[8, 16])


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms as after training, so that fusing them matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


@pytest.mark.parametrize(
    ('build', 'parts'),
    [
        (SLaK, dict(vertical=(13, 3), horizontal=(3, 13), small=(3, 3))),
        (PeLK, dict(peripheral=(9, 9), small=(3, 3))),  # 13: 2 + 2 + five of 1 + 2 + 2
    ],
)
def test_layers_of_a_backbone(build, parts):
    torch.manual_seed(0)
    options = dict(arch=ARCH, kernel_sizes=(13, 9), small_kernel=3, out_indices=(0, 1))
    model = with_statistics(nn.ModuleDict(dict(backbone=build(**options))))
    layers = large_kernel_layers(model)
    names = [f'backbone.stages.{i}.large_kernel' for i in ('0.0', '1.0', '1.1')]
    assert list(layers) == names
    kernels = layer_kernels(layers[names[0]])
    assert {name: tuple(w.shape[2:]) for name, w in kernels.weights.items()} == parts
    assert kernels.density == 1

    stage = model.backbone.stages[0]
    model.backbone.switch_to_deploy()
    deployed = layer_kernels(stage[0].large_kernel)
    assert torch.allclose(kernels.fused, deployed.fused, atol=1e-6)
    if build is PeLK:  # deployed it has one dense kernel
        assert torch.allclose(deployed.weights['peripheral'][:, 0], deployed.fused, atol=1e-6)
    else:
        vertical, horizontal = (deployed.weights[name] for name in ('vertical', 'horizontal'))
        square = nn.functional.pad(vertical, (5, 5)) + nn.functional.pad(horizontal, (0, 0, 5, 5))
        assert torch.allclose(square[:, 0], deployed.fused, atol=1e-6)


def test_convolutions_of_other_networks():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 7, groups=4, stride=2),
        nn.Conv2d(4, 4, 7),  # dense
        nn.Conv2d(4, 4, 3, groups=4),  # small
        DepthwiseConv2d(4, (1, 11)),
    )
    layers = large_kernel_layers(model)
    assert list(layers) == ['0', '3']
    for layer in layers.values():
        with torch.no_grad():
            layer.weight[:2] = 0
        kernels = layer_kernels(layer)
        assert list(kernels.weights) == ['kernel']
        assert kernels.density == 0.5
        assert torch.equal(kernels.fused, layer.weight[:, 0])


def test_the_fused_kernel_is_drawn():
    fused = torch.zeros(8, 9, 9)
    fused[3], fused[5] = 1, -2
    titles = [axis.get_title() for axis in draw_fused(fused, 2).axes]
    assert titles == ['mean of |w|', 'channel 5', 'channel 3', '', '']
    draw_fused(torch.zeros(1, 3, 3))  # all at zero


def test_a_field_over_its_picture():
    import matplotlib
    import numpy as np

    picture = np.full((60, 80, 3), (30, 60, 90), np.uint8)
    scores = np.zeros((60, 80))
    scores[10:20, 10:20] = 1
    drawn = overlay_field(picture, scores, (40, 60))
    assert drawn.shape == picture.shape
    assert (drawn[0, 0] == 60).all()  # grey
    brightest = np.array(matplotlib.colormaps['inferno'](1.0)[:3]) * 255
    assert np.abs(drawn[15, 15] - (0.1 * 60 + 0.9 * brightest)).max() <= 1
    changed = (drawn == 255).all(-1)
    assert changed.any()
    rows, columns = changed.nonzero()
    assert {*rows[columns != 60]} == {40}
    assert not changed[40, 60]  # the place itself stays visible
