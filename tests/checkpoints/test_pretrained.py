"""Weights of any known file in a backbone: all of them, or one clear error."""

import argparse
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmslak.checkpoints import pretrained
from mmslak.checkpoints.files import read_checkpoint, read_state_dict
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.errors import CheckpointError
from tests.checkpoints.official import OFFICIAL, from_pretrained, same, slak, weights


@pytest.fixture(scope='module')
def official() -> dict[str, torch.Tensor]:
    return weights(from_pretrained(OFFICIAL))


def test_official_file_reaches_every_tensor(official):
    raw = read_state_dict(OFFICIAL)
    assert torch.equal(
        official['stages.2.1.large_kernel.vertical.conv.weight'],
        raw['stages.2.1.large_kernel.LoRA1.conv.weight'],
    )
    assert torch.equal(
        official['stages.2.1.large_kernel.horizontal.bn.running_var'],
        raw['stages.2.1.large_kernel.LoRA2.bn.running_var'],
    )
    assert torch.equal(
        official['stages.0.0.large_kernel.small.conv.weight'],
        raw['stages.0.0.large_kernel.small_conv.conv.weight'],
    )
    assert len(official) == len(raw) - len(['norm.weight', 'norm.bias', 'head.weight', 'head.bias'])


def test_it_says_what_matched(monkeypatch):
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda text, logger: lines.append(text))
    load_pretrained(slak(), OFFICIAL)
    (said,) = lines
    assert '141 of 149 tensors of SLaK matched' in said
    assert 'new: norm0.weight, norm0.bias, norm1.weight and 5 more' in said
    assert 'left in the file: norm.weight, norm.bias, head.weight and 1 more' in said


def test_averaged_weights_when_asked_for(tmp_path, official):
    content = read_checkpoint(OFFICIAL)
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in content['model'].items()}
    torch.save({**content, 'model_ema': averaged}, tmp_path / 'both.pth')
    live, ema = (
        from_pretrained(tmp_path / 'both.pth'),
        from_pretrained(tmp_path / 'both.pth', use_ema=True),
    )
    assert same(weights(live), official)
    name = 'stages.0.0.pwconv1.weight'
    assert torch.equal(ema.state_dict()[name], official[name] + 1)
    with pytest.raises(CheckpointError, match='no averaged weights'):
        from_pretrained(OFFICIAL, use_ema=True)


@pytest.mark.parametrize('form', ['segmentor', 'distributed', 'bare', 'safetensors', 'runner'])
def test_other_files_of_ours(tmp_path, official, form):
    path = tmp_path / f'file.{"safetensors" if form == "safetensors" else "pth"}'
    state = weights(from_pretrained(OFFICIAL))
    if form == 'segmentor':
        whole = {f'backbone.{k}': v for k, v in state.items()}
        torch.save({'state_dict': {**whole, 'decode_head.conv.weight': torch.ones(3)}}, path)
    elif form == 'distributed':
        torch.save({'state_dict': {f'module.backbone.{k}': v for k, v in state.items()}}, path)
    elif form == 'bare':
        torch.save(state, path)
    elif form == 'safetensors':
        save_file(state, path)
    else:  # with the objects that MMEngine's message hub leaves in every checkpoint
        torch.save(
            {
                'state_dict': {f'backbone.{k}': v for k, v in state.items()},
                'message_hub': {'log_scalars': {'train/loss': HistoryBuffer([1.0], [1])}},
                'meta': {'iter': 3, 'path': Path('somewhere')},
                'param_schedulers': [{'milestones': Counter([27, 33])}],
                'args': argparse.Namespace(lr=0.1),
            },
            path,
        )
    assert same(weights(from_pretrained(path)), official)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(width_factor=1.0),
            r'of another shape \(downsample_layers.0.0.weight is 10×3×4×4, not 8',
        ),
        (dict(kernel_sizes=(31, 49, 47, 13)), 'vertical.conv.weight is 10×1×51×5, not 10×1×31×5'),
        (
            dict(arch=dict(depths=[1, 1, 3, 1], dims=[8, 16, 24, 32])),
            r'missing in the file \(stages.2.2',
        ),
        (
            dict(arch=dict(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])),
            r'that the model lacks \(stages.2.1',
        ),
        (dict(decomposed=False), 'large_kernel.square.conv.weight'),
    ],
)
def test_another_architecture_is_an_error(options, message):
    with pytest.raises(CheckpointError, match='of another architecture') as error:
        load_pretrained(slak(**options), OFFICIAL)
    assert re.search(message, str(error.value))
    assert str(OFFICIAL) in str(error.value)
