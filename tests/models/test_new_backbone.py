"""The backbone of docs/new-backbone.md does all that ours do."""

import re
import sys
from types import ModuleType

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmslak.analysis import complexity
from mmslak.errors import CheckpointError
from mmslak.registry import MODELS
from tests.golden import ROOT
from tests.models.test_slak import randomise_norms, relative_error
from tests.toy import Data, hook_of, train

PAGE = ROOT / 'docs/new-backbone.md'
SMALL = dict(arch=dict(depths=[1, 2], dims=[8, 16]), kernel_sizes=(21, 9), out_indices=(0, 1))
SMALL |= dict(width_factor=1.0, layer_scale_init_value=1.0, dilation=2)


@pytest.fixture(scope='module', autouse=True)
def _module():
    """The first piece of code on the page, as a module."""
    source = re.search(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[1]
    assert len([line for line in source.splitlines() if line.strip()]) <= 40
    sys.modules['dilated'] = module = ModuleType('dilated')
    exec(compile(source, str(PAGE), 'exec'), vars(module))
    yield
    del sys.modules['dilated'], MODELS.module_dict['DilatedBackbone']


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return MMENGINE_MODELS.build(dict(type='mmslak.DilatedBackbone', **SMALL, **options))


def test_forward_and_backward():
    model = small()
    outputs = model(torch.randn(2, 3, 64, 96))
    assert [tuple(o.shape) for o in outputs] == [(2, 8, 16, 24), (2, 16, 8, 12)]
    assert (model.out_channels, model.strides) == ((8, 16), (4, 8))
    sum(o.square().sum() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_deployment():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    randomise_norms(model)
    with torch.no_grad():
        expected = model(x)
        model.switch_to_deploy()
        got = model(x)
        model.switch_to_deploy()
        again = model(x)
    for a, b, c in zip(got, expected, again, strict=True):
        assert relative_error(a, b) <= 1e-5
        assert torch.equal(a, c)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(TypeError, match='only batch norm can be fused'):
        small(norm_cfg=dict(type='GN', num_groups=1)).switch_to_deploy()


def test_complexity():
    """A block: K² and 5² weights a channel, and an MLP of 2 · 4 · C², at every position."""
    parts = complexity(small(), (64, 64)).parts
    assert parts['stages.0'].macs == (8 * (21**2 + 25) + 8 * 8**2) * 16**2
    assert parts['stages.1'].macs == 2 * (16 * (9**2 + 25) + 8 * 16**2) * 8**2


def test_checkpoints(tmp_path):
    model = small()
    state = model.state_dict()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in state.items()}}, tmp_path / 'x.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    torch.manual_seed(1)
    loaded = MMENGINE_MODELS.build(dict(type='mmslak.DilatedBackbone', **SMALL, init_cfg=init_cfg))
    assert not torch.equal(loaded.stages[0][0].pwconv1.weight, state['stages.0.0.pwconv1.weight'])
    loaded.init_weights()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    other = MMENGINE_MODELS.build(
        dict(type='mmslak.DilatedBackbone', **{**SMALL, 'kernel_sizes': (23, 9)}, init_cfg=init_cfg)
    )
    with pytest.raises(CheckpointError, match=r'1 of another shape \(stages\.0\.0\.large_kernel'):
        other.init_weights()


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = small(gap_before_final_norm=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x, y, mode='tensor'):
        logits = self.head(self.backbone(x)[-1])
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def test_sparse_training(tmp_path):
    sparse = dict(sparsity=0.4, init='uniform', exclude=r'^head\.', update_interval=3)
    runner = train(tmp_path, sparse, model=Classifier(), data=Data())
    masks, weights = hook_of(runner).masks.active, dict(runner.model.named_parameters())
    for name, size in (('large.weight', 21**2), ('dilated.weight', 25)):
        mask = masks[f'backbone.stages.0.0.large_kernel.{name}']
        assert abs(int(mask.sum()) - 0.6 * 8 * size) <= 1
    assert all(not weights[name][~mask].any() for name, mask in masks.items())


def test_an_unknown_argument():
    with pytest.raises(TypeError, match=r"^DilatedBackbone.*; did you mean 'dilation'"):
        MODELS.get('DilatedBackbone')(dilatation=3)
