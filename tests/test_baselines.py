"""The baselines of the installed libraries, as the configs use them and as they say they differ."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmslak  # noqa: F401
from tests.golden import ROOT

BASELINES = sorted(
    path
    for path in (ROOT / 'configs').glob('*.py')
    if any(name in path.stem for name in ('convnext', 'swin', 'replknet'))
    and '_l2s_' not in path.stem  # they learn from SLaK
)


def test_they_are_all_there():
    tasks = ('upernet_{}_ade20k', 'cascade_mask_rcnn_{}_coco')
    names = [task.format(b) for task in tasks for b in ('convnext_t', 'swin_t', 'replknet_31b')]
    assert {path.stem for path in BASELINES} == {*names, 'faster_rcnn_convnext_t_voc07'}


@pytest.mark.parametrize('path', BASELINES, ids=lambda path: path.stem)
def test_a_baseline_differs_from_the_recipe_in_what_it_has_to(path: Path):
    """Data, schedule, heads and learning rate are SLaK-T's; the backbone is not."""
    cfg = Config.fromfile(path)
    task, _, data = path.stem.rpartition('_')
    task = task.removesuffix('_convnext_t').removesuffix('_swin_t').removesuffix('_replknet_31b')
    ours = Config.fromfile(ROOT / f'configs/{task}_slak_t_{data}.py')
    for part in ('train_dataloader', 'test_evaluator', 'param_scheduler', 'train_cfg'):
        assert cfg[part] == ours[part]
    assert cfg.optim_wrapper.optimizer == ours.optim_wrapper.optimizer
    assert cfg.model.backbone.drop_path_rate == ours.model.backbone.drop_path_rate
    assert cfg.model.backbone.type.startswith('mmpretrain.')
    assert cfg.custom_hooks == []  # dense


@pytest.mark.parametrize('task', ['upernet', 'cascade_mask_rcnn'])
def test_replknet_takes_its_classifier_but_for_the_norms_of_the_first_stages(task, tmp_path):
    (path,) = (path for path in BASELINES if path.stem.startswith(f'{task}_replknet'))
    backbone = Config.fromfile(path).model.backbone
    init_default_scope('mmpretrain')
    small = dict(
        large_kernel_sizes=[7, 7, 5, 3],
        layers=[1, 1, 2, 1],
        channels=[8, 16, 24, 32],
        small_kernel=3,
        dw_ratio=1,
    )
    classifier = MODELS.build({**backbone, 'arch': small, 'out_indices': (3,), 'init_cfg': None})
    weights = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    file = tmp_path / 'classifier.pth'
    state = {f'backbone.{name}': tensor for name, tensor in weights.items()}
    torch.save(dict(state_dict={**state, 'head.fc.bias': torch.zeros(10)}), file)

    init_cfg = dict(backbone.init_cfg, checkpoint=str(file))
    ours = MODELS.build({**backbone, 'arch': small, 'init_cfg': init_cfg})
    ours.init_weights()
    loaded = ours.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    fresh = {name.rpartition('.')[0] for name in loaded.keys() - weights.keys()}
    assert fresh == {f'stages.{i}.norm' for i in range(3)}
    for i in range(3):
        assert torch.equal(loaded[f'stages.{i}.norm.weight'], torch.ones(small['channels'][i]))

    ours.train()  # it gives nothing back
    outputs = ours(torch.rand(2, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [
        (8, 16, 16),
        (16, 8, 8),
        (24, 4, 4),
        (32, 2, 2),
    ]
    sum(output.square().sum() for output in outputs).backward()
    without = {name for name, p in ours.named_parameters() if p.grad is None}
    assert not without
    ours.eval()
    assert all(output.isfinite().all() for output in ours(torch.rand(1, 3, 64, 64)))
