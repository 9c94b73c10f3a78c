"""Backbones with fewer hidden units: built, loaded, deployed, exported and counted."""

import copy
import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmslak.analysis import complexity, export
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.checkpoints.whole_model import check_fit
from mmslak.errors import CheckpointError, UserError
from mmslak.models import PeLK, SLaK
from mmslak.registry import MODELS
from mmslak.sparsity import compact_, find_hidden_layers

ARCH = dict(depths=[2, 1], dims=[8, 12])
WIDTHS = [[20, 32], [1]]
each_kind = pytest.mark.parametrize('kind', [SLaK, PeLK])


def small(kind=SLaK, **options) -> nn.Module:
    torch.manual_seed(0)
    defaults = dict(width_factor=1.0, layer_scale_init_value=1.0, out_indices=(0, 1))
    return kind(ARCH, kernel_sizes=(9, 7), **{**defaults, **options})


@torch.no_grad()
def kill(model: nn.Module, widths: list[list[int]] = WIDTHS) -> nn.Module:
    """Makes hidden units zero until these are left, and lets the others have a bias."""
    for stage, row in zip(model.stages, widths, strict=True):
        for block, units in zip(stage, row, strict=True):
            nn.init.normal_(block.pwconv1.bias)
            block.pwconv1.weight[units:] = 0
    return model


def hidden(model: nn.Module) -> list[list[int]]:
    return [[block.pwconv1.out_features for block in stage] for stage in model.stages]


def largest_error(found, expected) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


@each_kind
def test_hidden_channels(kind):
    assert hidden(small(kind)) == [[32, 32], [48]]
    model = small(kind, hidden_channels=WIDTHS)
    assert hidden(model) == WIDTHS
    assert [p.shape for p in model.stages[0][0].pwconv2.parameters()] == [(8, 20), (8,)]
    assert hidden(small(kind, hidden_channels=WIDTHS, out_indices=0)) == WIDTHS[:1]
    assert hidden(small(kind, hidden_channels=WIDTHS[:1], out_indices=0)) == WIDTHS[:1]


@pytest.mark.parametrize(
    'given',
    [[[20], [1]], [[20, 32]], [20, 32], [], [[20, 32], [0]], [[20, 32], [1.0]], [[1, 1]] * 3],
)
def test_hidden_channels_that_do_not_fit(given):
    message = re.escape(
        'hidden_channels: expected lists of 2, 1 numbers above 0, one for each block of each '
        f'stage, got {given}'
    )
    with pytest.raises(ValueError, match=message):
        small(hidden_channels=given)


@each_kind
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_outputs_stay_and_the_state_fits(kind, dtype, tolerance):
    model, x = kill(small(kind)).to(dtype).eval(), torch.randn(2, 3, 40, 56, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        names = list(model.state_dict())
        widths = compact_(model)
        assert largest_error(model(x), expected) <= tolerance
    assert list(widths.values()) == [20, 32, 1]
    assert hidden(model) == WIDTHS
    assert list(model.state_dict()) == names
    twin = small(kind, hidden_channels=WIDTHS).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(map(torch.equal, twin(x), model(x)))


@each_kind
@pytest.mark.parametrize('compact', [False, True])
def test_deployed_and_compact(kind, compact):
    model, x = kill(small(kind)).double().eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        model.switch_to_deploy(compact=compact)
        assert largest_error(model(x), expected) <= 1e-12
    assert hidden(model) == (WIDTHS if compact else [[32, 32], [48]])


def test_a_compact_model_trains():
    model = small(hidden_channels=WIDTHS, with_cp=True)
    sum(y.mean() for y in model(torch.randn(2, 3, 32, 32))).backward()
    grads = [p.grad for name, p in model.named_parameters() if 'pwconv' in name]
    assert len(grads) == 12
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_onnx_of_a_compact_model(tmp_path):
    pytest.importorskip('onnxruntime', reason='the extra `export` is not installed')
    model, path = kill(small()).eval(), tmp_path / 'slak.onnx'
    whole = copy.deepcopy(model)
    compact_(model)
    export.to_onnx(export.deployed(model), torch.randn(1, 3, 64, 64), path, ['a', 'b'])
    errors = export.check(export.onnx_runner(path), whole, [(64, 64), (91, 45)], ['a', 'b'], 'x')
    assert max(errors.values()) <= 1e-5


def test_complexity_counts_what_is_left():
    whole, model = small(), kill(small())
    compact_(model)
    before, after = (complexity(m, (32, 32)).total for m in (whole, model))
    gone = [32 - 20 + 32 - 32, 48 - 1]
    # A unit has C weights before it, C behind it, and a bias.
    assert before.parameters - after.parameters == gone[0] * 17 + gone[1] * 25
    assert before.macs - after.macs == gone[0] * 16 * 8**2 + gone[1] * 24 * 4**2


def test_files_of_other_widths_say_what_to_type(tmp_path):
    compact = small(hidden_channels=WIDTHS)
    state = {f'backbone.{k}': v for k, v in compact.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'compact.pth')
    torch.save({'state_dict': small().state_dict()}, tmp_path / 'whole.pth')
    load_pretrained(small(hidden_channels=WIDTHS), tmp_path / 'compact.pth')
    message = (
        r'compact\.pth: its hidden units are not those of the config: '
        r'set hidden_channels=\[\[20, 32\], \[1\]\] in the backbone'
    )
    for options in ({}, dict(hidden_channels=[[20, 32], [2]])):
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(small(**options), tmp_path / 'compact.pth')
    with pytest.raises(CheckpointError, match='leave out hidden_channels in the backbone'):
        load_pretrained(compact, tmp_path / 'whole.pth')
    with pytest.raises(UserError, match='set hidden_channels='):
        check_fit(Segmentor(small()), 'compact.pth', state)
    for change in (dict(norm_cfg=dict(type='GN', num_groups=1)), dict(width_factor=2.0)):
        with pytest.raises(CheckpointError, match='of another architecture'):
            load_pretrained(small(**change), tmp_path / 'compact.pth')
    state['backbone.stages.0.0.pwconv1.weight'] = torch.ones(4, 8)
    torch.save(state, tmp_path / 'torn.pth')
    with pytest.raises(CheckpointError, match='of another architecture'):
        load_pretrained(small(), tmp_path / 'torn.pth')


class Segmentor(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


LIBRARIES = {
    'mmpretrain.ConvNeXt': (
        dict(arch=dict(depths=[1, 2], channels=[8, 12]), out_indices=(0, 1)),
        [9, 4, 48],
    ),
    'mmpretrain.SwinTransformer': (
        dict(
            arch=dict(embed_dims=8, depths=[1, 1], num_heads=[1, 2]),
            img_size=32,
            out_indices=(0, 1),
            pad_small_map=True,
        ),
        [7, 64],
    ),
    'mmseg.VisionTransformer': (
        dict(img_size=32, patch_size=16, embed_dims=8, num_layers=2, num_heads=2, out_indices=-1),
        [32, 5],
    ),
}


@pytest.mark.parametrize('name', LIBRARIES)
@pytest.mark.parametrize('scope', ['mmseg', 'mmpretrain'])
def test_backbones_of_the_libraries(name, scope):
    init_default_scope(scope)
    options, widths = LIBRARIES[name]
    backbone = ConfigDict(type=name, **options)
    torch.manual_seed(0)
    model = MMENGINE_MODELS.build(backbone)
    model.eval()  # mmpretrain's eval() returns None: no chaining
    layers, parameters = find_hidden_layers(model), dict(model.named_parameters())
    with torch.no_grad():
        for layer, units in zip(layers, widths, strict=True):
            parameters[f'{layer.first}.weight'][units:] = 0
            parameters[f'{layer.first}.bias'].normal_()
        x = torch.randn(1, 3, 32, 32)
        expected = model(x)
        assert list(compact_(model).values()) == widths
        assert largest_error(model(x), expected) <= 1e-6
    cfg = ConfigDict(type='mmslak.CompactBackbone', backbone=backbone, hidden_channels=widths)
    twin = MMENGINE_MODELS.build(cfg)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    with torch.no_grad():
        assert all(map(torch.equal, twin(x), model(x)))


def test_a_whole_segmentor_differs_by_rounding_alone():
    """Of float32 in any order: it is as far from float64 before as after."""
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    cfg = Config.fromfile('mmslak::demo/upernet_slak_digit_scenes.py').model
    cfg.backbone.update(init_cfg=None, arch=dict(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32]))
    cfg.decode_head.in_channels, cfg.auxiliary_head.in_channels = [8, 16, 24, 32], 24
    torch.manual_seed(0)
    whole = MMENGINE_MODELS.build(cfg)
    widths = [[20], [30], [96, 50], [1]]
    kill(whole.backbone, widths)
    with torch.no_grad():
        whole(torch.randn(4, 3, 64, 64))  # statistics of the norms
        x = torch.randn(1, 3, 64, 64)
        found = {}
        for dtype in (torch.float64, torch.float32):
            model = copy.deepcopy(whole).to(dtype).eval()
            found[dtype, 'whole'] = model(x.to(dtype))
            compact_(model)
            assert hidden(model.backbone) == widths
            found[dtype, 'compact'] = model(x.to(dtype))
    exact = found[torch.float64, 'whole']
    errors = {key: largest_error([y], [exact]) for key, y in found.items()}
    assert errors[torch.float64, 'compact'] <= 1e-12
    assert errors[torch.float32, 'compact'] <= 2 * errors[torch.float32, 'whole'] <= 1e-5


def test_a_backbone_without_hidden_layers():
    backbone = dict(type='mmpretrain.ResNet', depth=18)
    with pytest.raises(ValueError, match='ResNet has no hidden units that are found by name'):
        MODELS.build(dict(type='CompactBackbone', backbone=backbone, hidden_channels=[1]))
