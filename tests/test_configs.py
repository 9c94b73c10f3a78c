"""Every file in configs/ parses, its model builds, and backbone, neck and heads fit together."""

import functools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmslak  # noqa: F401
from mmslak.apis.config import accepted_arguments, innermost_datasets, resolve, walk
from mmslak.apis.options import READ_BY_MMENGINE
from tests.golden import ROOT

FILES = sorted((ROOT / 'configs').rglob('*.py'))
CONFIGS = [path for path in FILES if '_base_' not in path.parts]
UPERNETS = {
    # name: channels, drop path, num_layers of the decay
    'upernet_slak_t_ade20k': ([124, 249, 499, 998], 0.4, 6),
    'upernet_slak_s_ade20k': ([124, 249, 499, 998], 0.3, 12),
    'upernet_slak_b_ade20k': ([166, 332, 665, 1331], 0.4, 12),
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / 'configs'))


@pytest.mark.parametrize('path', FILES, ids=name)
def test_config_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""')


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_model_builds_and_its_parts_fit(path, monkeypatch):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    # Shapes are all that matters here: nothing is allocated or computed on 'meta', but for the
    # drop path rates that backbones read back from a tensor.
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        model.eval()
        inputs = torch.empty(2, 3, 64, 64)
        if cfg.default_scope == 'mmdet':  # heads would sort their proposals
            outputs = model.extract_feat(inputs)
        else:
            outputs = model(inputs, mode='tensor')
    assert all(p.is_meta for p in model.parameters())
    if cfg.default_scope == 'mmseg':
        student = cfg.model.get('student', cfg.model)
        assert outputs.shape[:2] == (2, student.decode_head.num_classes)
    elif cfg.default_scope == 'mmpretrain':
        features = outputs[-1] if isinstance(outputs, tuple) else outputs
        assert len(features) == 2
    else:
        assert [len(level) for level in outputs] == [2] * len(outputs)


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_everything_that_a_config_names_exists(path):
    """Datasets, transforms, hooks and the rest resolve and take the arguments they are given."""
    cfg = Config.fromfile(path)
    checked = 0
    for place, value in walk(cfg):
        # Models are built by the test above; variables of the file are used elsewhere.
        if not isinstance(value, dict) or 'type' not in value or place.startswith('model.'):
            continue
        if place == 'model' or place.endswith('.structure'):  # a setting of SparseTrainingHook
            continue
        found = resolve(value, cfg)
        assert found is not None, f'{place}: nothing is called {value["type"]}'
        takes = accepted_arguments(found)
        if takes is not None:
            assert set(value) <= takes | READ_BY_MMENGINE, f'{place}: {value["type"]}'
        checked += 1
    assert checked > 10


def without_scopes(steps: list[dict]) -> list[dict]:
    """Steps of a pipeline; whether MMEngine stamps a base's scope on them depends on the place."""
    return [{key: value for key, value in step.items() if key != '_scope_'} for step in steps]


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_the_test_pipeline_stands_at_the_top(path):
    """There the libraries' inferencers and mmdeploy look for it."""
    cfg = Config.fromfile(path)
    for _, dataset in innermost_datasets(cfg.test_dataloader.dataset):
        assert without_scopes(dataset.pipeline) == without_scopes(cfg.test_pipeline)


@pytest.mark.parametrize('stem', UPERNETS)
def test_upernet_follows_the_published_recipe(stem):
    channels, drop_path_rate, num_layers = UPERNETS[stem]
    cfg = Config.fromfile(ROOT / f'configs/{stem}.py')
    assert cfg.model.backbone.drop_path_rate == drop_path_rate
    assert cfg.model.backbone.layer_scale_init_value == 1.0
    assert cfg.model.backbone.init_cfg.checkpoint == cfg.checkpoint
    assert cfg.model.decode_head.in_channels == channels
    assert cfg.model.auxiliary_head.in_channels == channels[2]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    optimizer = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.optim_wrapper.paramwise_cfg == dict(
        decay_type='stage_wise', decay_rate=0.9, num_layers=num_layers
    )
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size == 16


def test_upernet_80k_follows_the_published_recipe():
    cfg = Config.fromfile(ROOT / 'configs/upernet_slak_t_ade20k_80k.py')
    assert cfg.model.backbone.drop_path_rate == 0.1
    assert cfg.optim_wrapper.optimizer.lr == 2e-4
    assert 'constructor' not in cfg.optim_wrapper
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 80000
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 800
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.custom_hooks == []  # dense


def test_compact_upernet_has_lost_40_percent_of_its_hidden_units():
    cfg = Config.fromfile(ROOT / 'configs/upernet_slak_t_compact_ade20k.py').model.backbone
    for row, depth, channels in zip(
        cfg.hidden_channels, (3, 3, 9, 3), (124, 249, 499, 998), strict=True
    ):
        assert row == [round(0.6 * 4 * channels)] * depth
