"""Stages after the last of out_indices do not exist, and files that have them load."""

import re

import pytest
import torch
from torch import nn

from mmslak.checkpoints import pretrained
from mmslak.checkpoints.files import read_state_dict, save_state_dict
from mmslak.checkpoints.names import convert
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.errors import CheckpointError
from mmslak.models import PeLK, SLaK
from tests.golden import GOLDEN, slak_options

SMALL = dict(
    arch=dict(depths=[1, 1, 4, 1], dims=[8, 12, 16, 24]),
    kernel_sizes=(13, 11, 9, 7),
    layer_scale_init_value=1.0,
)
OFFICIAL = GOLDEN / 'slak_decomposed.pth'
each_kind = pytest.mark.parametrize('kind', [SLaK, PeLK])


def build(kind, *out_indices: int, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**{**SMALL, 'out_indices': out_indices or (0, 1, 2, 3), **options})


@each_kind
@pytest.mark.parametrize('out_indices', [(0,), (0, 2), (1,), (2, 0), (-2,), (-1,), (1, 3)])
def test_everything_that_exists_is_trained(kind, out_indices):
    model = build(kind, *out_indices)
    sum(o.square().sum() for o in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())
    built = max(i % 4 for i in out_indices) + 1
    assert len(model.stages) == len(model.downsample_layers) == built
    whole = build(kind).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()}.items() <= {
        k: v.shape for k, v in whole.items()
    }.items()


@each_kind
def test_it_gives_the_maps_of_the_whole(kind, tmp_path):
    """Files of the whole backbone load strictly, by the ways of torch and of ours."""
    whole = build(kind, seed=1).eval()
    torch.save(
        {'state_dict': {f'backbone.{k}': v for k, v in whole.state_dict().items()}},
        tmp_path / 'x.pth',
    )
    x = torch.randn(2, 3, 64, 64)
    expected = whole(x)[:2]
    own, model = build(kind, 0, 1).eval(), nn.ModuleDict(dict(backbone=build(kind, 0, 1))).eval()
    load_pretrained(own, tmp_path / 'x.pth')
    model.load_state_dict(read_state_dict(tmp_path / 'x.pth'), strict=True)
    for partial in (own, model['backbone']):
        for a, b in zip(partial(x), expected, strict=True):
            assert torch.equal(a, b)
    own.switch_to_deploy()
    for a, b in zip(own(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_it_says_what_is_left_in_the_file(monkeypatch):
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda text, logger: lines.append(text))
    model = SLaK(**slak_options('slak_decomposed'), out_indices=1)
    load_pretrained(model, OFFICIAL)
    assert re.search(r'left in the file: downsample_layers\.2\.0\.weight, .* more', lines[0])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(depths=[1, 2, 2, 1]), r'missing in the file \(stages\.1\.1\.gamma'),
        (dict(depths=[1, 1]), r'that the model lacks \(downsample_layers\.2\.0\.weight'),
        (dict(dims=[8, 20, 24, 32]), r'downsample_layers\.1\.1\.weight is 20×10×2×2, not 26×10'),
    ],
)
def test_another_architecture_is_still_an_error(change, message):
    options = slak_options('slak_decomposed')
    arch = {**options['arch'], **change}
    count = len(arch['depths'])
    arch['dims'] = arch['dims'][:count]
    options.update(arch=arch, kernel_sizes=options['kernel_sizes'][:count])
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(SLaK(**options, out_indices=1), OFFICIAL)


def test_a_converted_file_loads(tmp_path):
    save_state_dict(convert(OFFICIAL), tmp_path / 'clean.pth')
    model = SLaK(**slak_options('slak_decomposed'), out_indices=(0, 1))
    load_pretrained(model, tmp_path / 'clean.pth')
    expected = read_state_dict(OFFICIAL)
    assert torch.equal(model.stages[1][0].gamma, expected['stages.1.0.gamma'])


@each_kind
def test_ids_and_rates_are_those_of_the_whole(kind):
    whole, model = (build(kind, *i, drop_path_rate=0.6) for i in ((), (0, 2)))
    names = [f'backbone.{name}' for name, _ in model.named_parameters()]
    for name in names:
        depth = model.get_layer_depth(name, 'backbone.')
        assert depth == whole.get_layer_depth(name, 'backbone.')
    for stage, other in zip(model.stages, whole.stages):
        for block, same in zip(stage, other, strict=True):
            rates = (getattr(b.drop_path, 'drop_prob', 0.0) for b in (block, same))
            assert next(rates) == next(rates)


@each_kind
@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(kind, frozen):
    model = build(kind, 0, 1, frozen_stages=frozen).train()
    for i in range(2):
        assert model.stages[i].training == (frozen <= i)
        for part in (model.stages[i], getattr(model, f'norm{i}')):
            assert {p.requires_grad for p in part.parameters()} == {frozen <= i}


@pytest.mark.parametrize('out_indices', [(3,), (-1,), (1, 3), (3, 1), (2, 3, 0), (1,), (0, 2)])
def test_the_last_stage_takes_the_classifiers_norm(out_indices):
    """In whatever order the outputs are wanted; without that stage nothing takes it."""
    model = SLaK(
        **slak_options('slak_decomposed'), out_indices=out_indices, gap_before_final_norm=True
    )
    final = read_state_dict(OFFICIAL)['norm.weight']
    for load in (
        load_pretrained,
        lambda model, path: model.load_state_dict(read_state_dict(path), strict=False),
    ):
        for i in model.out_indices:
            nn.init.constant_(getattr(model, f'norm{i}').weight, 5)
        load(model, OFFICIAL)
        for i in model.out_indices:
            weight = getattr(model, f'norm{i}').weight
            assert torch.equal(weight, final if i == 3 else torch.full_like(weight, 5))
