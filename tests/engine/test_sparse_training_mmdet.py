"""SparseTrainingHook in a stock config of mmdet, with nothing but the hook added."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mmslak  # noqa: F401
from tests.miniatures import write_coco
from tests.toy import hook_of

pytest.importorskip('mmdet')

CONFIG = """
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_hooks = [dict(type='mmslak.SparseTrainingHook', update_interval=1, grow='gradient')]
"""


def test_faster_rcnn_trains_sparsely(tmp_path):
    """Two iterations on pictures of 64×96, starting with SNIP; the stem and stage 1 are frozen."""
    (tmp_path / 'config.py').write_text(CONFIG)
    cfg = Config.fromfile(tmp_path / 'config.py')
    loader = cfg.train_dataloader
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader.dataset.data_root = str(write_coco(tmp_path / 'coco', size=(64, 96), train=2))
    (resize,) = (step for step in loader.dataset.pipeline if step.type == 'Resize')
    resize.scale = (96, 64)
    cfg.model.backbone.init_cfg = None  # the pretrained weights are not here
    cfg.model.backbone.zero_init_residual = False  # without them SNIP needs a gradient at once
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.checkpoint.save_optimizer = False  # time
    for name in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[name] = cfg[name.replace('val', 'test', 1)] = None
    cfg.work_dir = str(tmp_path / 'work')
    cfg.experiment_name = f'sparse_training_mmdet_{os.getpid()}'

    runner = Runner.from_cfg(cfg)
    dense = list(runner.model.state_dict())
    runner.train()

    hook = hook_of(runner)
    assert hook.step == 2
    assert hook.masks.updates == 1  # after the first step; never after the last
    total = sum(mask.numel() for mask in hook.masks.active.values())
    assert sum(hook.masks.nnz.values()) == round(0.6 * total)
    trained = {n for n, p in runner.model.named_parameters() if p.dim() > 1 and p.requires_grad}
    assert set(hook.masks.active) == trained
    assert not any(n.startswith(('backbone.conv1', 'backbone.layer1')) for n in trained)
    assert len(trained) == 57

    saved = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)
    assert list(saved['state_dict']) == dense
    for name, mask in hook.masks.active.items():
        assert saved['state_dict'][name][~mask].count_nonzero() == 0, name
    # Nearly all active weights are in use: what grew last has had its step.
    used = sum(int(saved['state_dict'][name].count_nonzero()) for name in trained)
    assert used > 0.95 * 0.6 * total
