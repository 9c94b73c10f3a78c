"""Graphs of any height and width, their check against PyTorch, and what failures say."""

import collections
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from mmslak.analysis import export
from mmslak.models import SLaK

SIZES = [(64, 64), (91, 101)]


def slak() -> SLaK:
    """A small one whose norms have statistics, so that fusing them matters."""
    torch.manual_seed(0)
    arch = dict(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])
    model = SLaK(arch, kernel_sizes=(51, 49, 47, 13), layer_scale_init_value=1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize('size', [(12, 6), (7, 11), (1, 2), (16, 23), (5, 3)])
@pytest.mark.parametrize('bins', [(1, 1), (2, 2), (3, 3), (6, 6), (2, 5)])
def test_averaging_pool_is_adaptive_pooling(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(
        export.AveragingPool2d(bins)(x), nn.AdaptiveAvgPool2d(bins)(x), rtol=1e-12, atol=1e-12
    )


def test_deployed_is_a_fused_copy():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = slak()
            self.pools = nn.ModuleList([nn.AdaptiveAvgPool2d(n) for n in (1, 2, (3, None))])

    model = Model()
    copy = export.deployed(model)
    assert not any(m.deployed for m in model.modules() if hasattr(m, 'deployed'))
    assert all(m.deployed for m in copy.modules() if hasattr(m, 'deployed'))
    assert [type(pool) for pool in model.pools] == [nn.AdaptiveAvgPool2d] * 3
    assert [type(pool) for pool in copy.pools] == [
        *(nn.AdaptiveAvgPool2d, export.AveragingPool2d, nn.AdaptiveAvgPool2d)
    ]


def test_backbone_in_onnxruntime(tmp_path):
    model, path = slak(), tmp_path / 'slak.onnx'
    names = [f'stage{i}' for i in range(4)]
    export.to_onnx(export.deployed(model), torch.randn(1, 3, *SIZES[0]), path, names)
    errors = export.check(export.onnx_runner(path), model, SIZES, names, 'slak.onnx')
    assert list(errors) == SIZES
    assert max(errors.values()) <= 1e-4
    batch = torch.randn(3, 3, 40, 50)
    for got, wanted in zip(export.onnx_runner(path)(batch), model(batch), strict=True):
        assert export.relative_error(got, wanted) <= 1e-4

    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {''}
    kernels = collections.Counter(
        tuple(attribute.ints)
        for node in graph.node
        if node.op_type == 'Conv'
        for attribute in node.attribute
        if attribute.name == 'kernel_shape'
    )
    # Strips alone: norms and small kernels are in them.
    for stage, long in enumerate((51, 49, 47, 13)):
        assert kernels[(long, 5)] == kernels[(5, long)] == 1, stage
    assert kernels[(5, 5)] == 0
    assert not any(node.op_type == 'BatchNormalization' for node in graph.node)


def test_backbone_in_torchscript(tmp_path):
    model, path = slak(), tmp_path / 'slak.ts'
    export.to_torchscript(export.deployed(model), torch.randn(1, 3, *SIZES[0]), path)
    loaded = torch.jit.load(str(path))
    errors = export.check(
        lambda x: export.outputs_of(loaded, x), model, SIZES, list('abcd'), 'slak.ts'
    )
    assert max(errors.values()) <= 1e-4


class Fixed(nn.Module):
    """Bakes the traced size in."""

    def forward(self, x):
        size = [int(s) for s in x.shape]
        return x.reshape(size[0], size[1], -1).mean(1, keepdim=True).reshape(1, 1, *size[2:])


class FixedValue(nn.Module):
    def forward(self, x):
        return x / int(x.shape[2])


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


def test_a_baked_in_size_names_node_and_size(tmp_path):
    path = tmp_path / 'fixed.onnx'
    export.to_onnx(Fixed(), torch.randn(1, 3, 8, 8), path, ['y'])
    with pytest.raises(export.ExportError, match=r'fixed at 9×12 does not run.*Reshape'):
        export.check(export.onnx_runner(path), Fixed(), [(8, 8), (9, 12)], ['y'], 'fixed')


def test_other_values_name_output_and_size(tmp_path):
    path = tmp_path / 'fixed.onnx'
    export.to_onnx(FixedValue(), torch.randn(1, 3, 8, 8), path, ['y'])
    with pytest.raises(export.ExportError, match=r"at 9×12: output 'y' differs .* by 0.12.*traced"):
        export.check(export.onnx_runner(path), FixedValue(), [(8, 8), (9, 12)], ['y'], 'fixed')


def test_nan_is_no_agreement():
    nan = lambda x: [x * torch.nan]  # noqa: E731
    with pytest.raises(export.ExportError, match='differs'):
        export.check(nan, lambda x: x, [(4, 4)], ['y'], 'nan')
    with pytest.raises(export.ExportError, match=r"'y' is \(1, 3, 4\), expected \(1, 3, 4, 4\)"):
        export.check(lambda x: [x[..., 0]], lambda x: x, [(4, 4)], ['y'], 'shape')


def test_an_operator_without_onnx_form_is_named(tmp_path):
    with pytest.raises(export.ExportError, match=r'no ONNX for this model: .*linalg_qr'):
        export.to_onnx(Unknown(), torch.randn(1, 3, 8, 8), tmp_path / 'u.onnx', ['q'])


def test_what_cannot_be_traced(tmp_path):
    class Words(nn.Module):
        def forward(self, x):
            return 'words'

    with pytest.raises(export.ExportError, match='tracing failed'):
        export.to_torchscript(Words(), torch.randn(1, 3, 8, 8), Path(tmp_path, 'w.ts'))
