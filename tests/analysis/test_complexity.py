"""Costs against published figures, torch's own counter and small cases by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmslak import sparsity
from mmslak.analysis import Cost, complexity
from mmslak.models import SLaK


class Classifier(nn.Module):
    """A backbone with a linear head."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int = 1000) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.backbone(x)[-1])


@torch.no_grad()
def zero_uniformly(model: nn.Module, share: float) -> None:
    """Zeroes the same share of every weight of two or four dimensions."""
    weights = {n: p for n, p in model.named_parameters() if p.dim() in (2, 4)}
    counts = sparsity.uniform({n: p.shape for n, p in weights.items()}, share)
    for name, weight in weights.items():
        weight.view(-1)[counts[name] :] = 0


def gmacs(macs: int) -> str:
    return f'{macs / 1e9:.2f}'


@pytest.mark.parametrize(
    ('arch', 'size', 'dense', 'nonzero', 'parameters'),
    [
        ('tiny', 224, '8.70', '5.22', '50.7'),
        ('small', 224, '16.60', '9.96', '91.1'),
        ('base', 224, '28.51', '17.11', '158.0'),
        ('base', 384, '83.78', '50.27', '158.0'),
    ],
)
def test_slak(arch, size, dense, nonzero, parameters):
    """The 40 % zeros are uniform; the papers' 5.0, 9.8, 17.1 and 50.3 have SNIP's shares."""
    backbone = SLaK(arch, gap_before_final_norm=True, out_indices=3)
    model = Classifier(backbone, backbone.channels[-1])
    found = complexity(model, (size, size)).total
    assert gmacs(found.macs) == dense
    assert f'{found.parameters / 1e6:.1f}' == parameters
    zero_uniformly(model, 0.4)
    sparse = complexity(model, (size, size)).total
    assert gmacs(sparse.nonzero_macs) == nonzero
    assert sparse.macs == found.macs
    assert sparse.parameters == found.parameters


def convnext():
    from mmpretrain.models import ConvNeXt

    return ConvNeXt(dict(depths=[1, 1, 2, 1], channels=[16, 32, 48, 64]))


def swin():
    from mmpretrain.models import SwinTransformer

    arch = dict(embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4])
    return SwinTransformer(arch, pad_small_map=True)


def slak(**options):
    arch = dict(depths=[1, 1, 2, 1], dims=[16, 32, 48, 64])
    return SLaK(arch, kernel_sizes=(51, 49, 47, 13), **options)


@pytest.mark.parametrize('build', [slak, convnext, swin])
def test_agrees_with_torch(build, monkeypatch):
    # Torch counts operators: large kernels have to be its own convolutions, as in exports.
    monkeypatch.setattr(torch.jit, 'is_tracing', lambda: True)
    model = build()
    model.eval()
    found = complexity(model, (96, 128))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 96, 128))
    assert 2 * found.total.macs == counter.get_total_flops() > 0
    assert sum(found.parts.values(), Cost()) == found.total
    assert found.total.parameters == sum(p.numel() for p in model.parameters())


def test_how_a_kernel_is_computed_does_not_matter():
    backends = ('auto', 'native', 'fft', 'toeplitz')
    found = [complexity(slak(conv_backend=b), (256, 256)).total.macs for b in backends]
    assert len(set(found)) == 1


def test_fused_kernels_have_no_small_one():
    model = slak()
    before = complexity(model, (64, 64)).total
    model.switch_to_deploy()
    after = complexity(model, (64, 64)).total
    small = 25 * (20 * 256 + 41 * 64 + 2 * 62 * 16 + 83 * 4)  # channels × positions of each block
    assert before.macs - after.macs == small


def test_shared_weights_count_wherever_they_stand():
    """51×51 kernels of 13×13 weights: those as parameters, these as MACs."""
    from mmslak.models.peripheral import PeripheralConv2d

    conv = PeripheralConv2d(4, 51, center=5)
    nn.init.ones_(conv.weight)
    conv.weight.data[:, :, 0, 0] = 0  # stands for 9 × 9 in a corner
    total = complexity(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), conv), (16, 20)).total
    assert total.parameters == 12 + 4 * 169
    assert total.macs == (12 + 4 * 2601) * 320
    assert total.nonzero_macs == (12 + 4 * (2601 - 81)) * 320
    assert total.nonzero_parameters == 12 + 4 * 168


@torch.no_grad()
def test_by_hand():
    model = nn.Sequential()
    model.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)  # 216 weights × 6·5 positions
    model.up = nn.ConvTranspose2d(8, 4, 2, stride=2)  # 128 weights × 6·5 of its input
    model.depthwise = nn.Conv2d(4, 4, (5, 1), groups=4)  # 20 weights × 8·10
    model.flat = nn.Flatten(2)
    model.linear = nn.Linear(80, 7, bias=False)  # 560 weights × 4 rows
    model.conv.weight[:, 0] = 0  # 72 of 216
    model.linear.weight[3] = 0  # 80 of 560
    total = complexity(model, (12, 10)).total
    assert total.macs == 216 * 30 + 128 * 30 + 20 * 80 + 560 * 4
    assert total.nonzero_macs == 144 * 30 + 128 * 30 + 20 * 80 + 480 * 4
    assert total.parameters == 216 + 8 + 128 + 4 + 20 + 4 + 560
    assert total.parameters - total.nonzero_parameters == 72 + 80


def test_products_of_activations_count_whole():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)[:, None]  # (1, 1, 20, 3)
            y = nn.functional.scaled_dot_product_attention(x, x, x)
            return torch.matmul(y, x.transpose(2, 3)) * self.scale

    total = complexity(Attention(), (4, 5)).total
    assert total.macs == total.nonzero_macs == 20 * 20 * 3 * 3
    assert (total.parameters, total.nonzero_parameters) == (1, 0)


def test_parts_follow_the_model():
    model = Classifier(slak(), 83, classes=5)
    model.forward = lambda x: model.head.forward(model.backbone(x)[-1].mean((2, 3)))
    parts = complexity(model, (64, 64)).parts
    stages = [f'backbone.stages.{i}' for i in range(4)]
    assert [name for name in parts if 'stages' in name] == stages
    assert 'backbone.downsample_layers.0' in parts
    assert 'head' in parts
    block = model.backbone.stages[3][0]
    kernels = sum(p.numel() for p in block.large_kernel.parameters() if p.dim() == 4)
    dense = block.pwconv1.weight.numel() + block.pwconv2.weight.numel()
    assert parts['backbone.stages.3'].macs == (kernels + dense) * 2 * 2


def test_mode_is_kept():
    model = slak().train()
    complexity(model, (64, 64))
    assert model.training
