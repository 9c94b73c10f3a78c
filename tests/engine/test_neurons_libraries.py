"""SparseTrainingHook with hidden units on backbones of ours and of the libraries."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmslak.sparsity import compact_
from tests.models.test_compact import LIBRARIES, largest_error
from tests.toy import Data, build_runner, hook_of, records

SWIN = LIBRARIES['mmpretrain.SwinTransformer'][0]
OURS = dict(
    arch=dict(depths=[1, 2], dims=[8, 12]),
    kernel_sizes=(9, 7),
    width_factor=1.0,
    layer_scale_init_value=1.0,
    out_indices=(0, 1),
)
BACKBONES = {  # options, and the hidden units of each layer
    'mmslak.SLaK': (OURS, [32, 48, 48]),
    'mmslak.PeLK': (OURS, [32, 48, 48]),
    'mmpretrain.ConvNeXt': (
        LIBRARIES['mmpretrain.ConvNeXt'][0] | dict(layer_scale_init_value=1.0),
        [32, 48, 48],
    ),
    'mmpretrain.SwinTransformer': (SWIN, [32, 64]),
    'mmpretrain.VisionTransformer': (
        dict(
            arch=dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=32),
            img_size=32,
            patch_size=16,
        ),
        [32, 32],
    ),
    'mmseg.SwinTransformer': (
        dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)),
        [32, 64],
    ),
    'mmseg.VisionTransformer': (LIBRARIES['mmseg.VisionTransformer'][0], [32, 32]),
    'mmdet.SwinTransformer': (
        dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)),
        [32, 64],
    ),
}
SPARSE = dict(
    update_interval=2,
    prune_rate=0.3,
    sparsity=0.5,
    init='uniform',
    exclude='^head',
    structure=dict(type='neuron', share=0.4, until=0.75),
)


class Classifier(BaseModel):
    """A backbone of any kind and a linear head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.no_grad():
            self.head = nn.Linear(self.features(torch.zeros(2, 3, 32, 32)).shape[1], 4)

    def features(self, x: Tensor) -> Tensor:
        last = self.backbone(x)[-1]
        return last.flatten(2).mean(2) if last.dim() > 2 else last

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict | Tensor:
        logits = self.head(self.features(x))
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


class Pictures(Data):
    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return dict(x=torch.randn(3, 32, 32, generator=generator), y=torch.tensor(index % 4))


def classifier(name: str) -> Classifier:
    scope = name.split('.')[0]
    if scope != 'mmslak':
        pytest.importorskip(scope)
    init_default_scope('mmengine' if scope == 'mmslak' else scope)
    torch.manual_seed(0)
    return Classifier(MODELS.build(dict(type=name, **BACKBONES[name][0])))


@pytest.mark.parametrize('name', BACKBONES)
def test_units_go_counts_stay_and_compaction_is_exact(tmp_path: Path, name: str):
    model, hidden = classifier(name), BACKBONES[name][1]
    optimizer = dict(type='AdamW', lr=1e-3)
    runner = build_runner(
        tmp_path, SPARSE, model=model, data=Pictures(), iters=8, optimizer=optimizer
    )
    runner.train()
    hook = hook_of(runner)
    units = hook._neurons.units
    assert [len(alive) for alive in units.alive.values()] == hidden
    left = [n - round(0.4 * n) for n in hidden]
    assert list(units.counts.values()) == left
    masked = sum(mask.numel() for mask in hook.masks.active.values())
    assert {sum(int(m.sum()) for m in r['masks'].values()) for r in records(runner)} == {
        round(0.5 * masked)
    }
    model = model.cpu()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        whole = copy.deepcopy(model).to(dtype)
        whole.eval()
        small = copy.deepcopy(whole)
        # Fewer than are alive where all weights of a unit have been dropped.
        widths = list(compact_(small.backbone).values())
        assert all(one <= most for one, most in zip(widths, left, strict=True))
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
        with torch.no_grad():
            assert largest_error(small.backbone(x), whole.backbone(x)) <= tolerance
