import re
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmslak.engine import LayerDecayOptimWrapperConstructor
from mmslak.models import PeLK, PeripheralConv2d
from tests.models.test_slak import randomise_norms, relative_error
from tests.toy import Data, hook_of, train

SMALL = dict(
    arch=dict(depths=[1, 1, 4, 1], dims=[8, 12, 16, 24]), kernel_sizes=(31, 13, 9, 7), center=3
)
FORMS = {
    'default': dict(),
    'strict borders': dict(strict_borders=True),
    'without small kernel': dict(small_kernel=None),
    'all channels': dict(conv_ratio=1.0),
}


def small(**options) -> PeLK:
    torch.manual_seed(0)
    return PeLK(**{**SMALL, 'layer_scale_init_value': 1.0, **options})


@pytest.mark.parametrize('form', FORMS)
def test_feature_maps(form):
    model = small(**FORMS[form])
    outputs = model(torch.randn(2, 3, 64, 96))
    shapes = [(2, 10, 16, 24), (2, 15, 8, 12), (2, 20, 4, 6), (2, 31, 2, 3)]
    assert [tuple(o.shape) for o in outputs] == shapes
    sum((o**2).sum() for o in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize(
    ('name', 'parameters', 'macs', 'sparse_parameters', 'sparse_macs'),
    [
        ('T', 48739822, 9735277828, 28.8, 5.84),
        ('S', 85334290, 18236932276, 50.8, 10.94),
        ('B', 150223796, 30696330342, 89.6, 18.42),
        ('B-101', 152058684, 114086690072, 89.9, 68.45),
    ],
)
def test_complexity_is_near_the_published(
    name, parameters, macs, sparse_parameters, sparse_macs, monkeypatch
):
    """The figures of docs/pelk.md; only the MACs of T are more than 3 % off."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'benchmarks')
    from pelk_complexity import PUBLISHED, count

    options, size, published_parameters, published_macs = PUBLISHED[name]
    found = count(options, size)
    assert (found.parameters, found.macs) == (parameters, macs)
    assert round(found.sparse_parameters / 1e6, 1) == sparse_parameters
    assert round(found.sparse_macs / 1e9, 2) == sparse_macs
    assert sparse_parameters == pytest.approx(published_parameters, rel=0.03)
    assert sparse_macs == pytest.approx(published_macs, rel=0.045 if name == 'T' else 0.03)


def test_only_the_first_channels_are_convolved():
    block = small().stages[0][0].large_kernel
    x = torch.randn(2, 10, 16, 16)
    y = block(x)
    assert block.peripheral.channels == 3  # 3/8 of 10
    assert torch.equal(y[:, 3:], x[:, 3:])
    assert not torch.allclose(y[:, :3], x[:, :3])
    changed = x.clone()
    changed[:, 3:] += 1
    assert torch.equal(block(changed)[:, :3], y[:, :3])


def test_blocks_of_a_stage_share_one_embedding():
    names = [n for n in small().state_dict() if 'embedding' in n]
    assert names == [f'stages.{i}.position_embedding' for i in range(4)]
    assert small().stages[0].position_embedding.shape == (3, 31, 31)


def test_embedding_moves_the_output():
    model, x = small(), torch.randn(2, 3, 64, 64)
    before = model(x)
    with torch.no_grad():
        model.stages[3].position_embedding += 1
    after = model(x)
    assert torch.equal(before[2], after[2])
    assert not torch.allclose(before[3], after[3])


@pytest.mark.parametrize('form', FORMS)
def test_deployed_form_gives_the_same_outputs(form):
    model = small(**FORMS[form]).eval()
    randomise_norms(model)
    with torch.no_grad():
        for stage in model.stages:
            stage.position_embedding.normal_()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        model.switch_to_deploy()
        got = model(x)
        model.switch_to_deploy()  # a second call changes nothing
        again = model(x)
    for a, b, c in zip(got, expected, again, strict=True):
        assert relative_error(a, b) <= 1e-5
        assert torch.equal(a, c)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    kernels = [m.weight.shape[2:] for m in model.modules() if isinstance(m, PeripheralConv2d)]
    assert kernels == [(31, 31), (13, 13), *[(9, 9)] * 4, (7, 7)]


def test_fusing_needs_batch_norm():
    model = small(norm_cfg=dict(type='GN', num_groups=1))
    with pytest.raises(TypeError, match='only batch norm can be fused'):
        model.switch_to_deploy()
    model(torch.randn(1, 3, 32, 32))  # as it was


def test_checkpointing_changes_nothing():
    x, results = torch.randn(2, 3, 32, 32), []
    for with_cp in (False, True):
        model = small(with_cp=with_cp, drop_path_rate=0.5)
        torch.manual_seed(1)
        image = x.clone().requires_grad_()
        outputs = model(image)
        sum((o**2).sum() for o in outputs).backward()
        gradients = [image.grad, *(p.grad for p in model.parameters())]
        results.append([*outputs, *gradients, *model.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('frozen', [-1, 0, 2])
def test_frozen_stages(frozen):
    model = small(frozen_stages=frozen).train()
    for i in range(4):
        parameters = list(model.stages[i].parameters())
        assert {p.requires_grad for p in parameters} == {frozen <= i}


def test_norm_eval_keeps_the_statistics():
    model = small(norm_eval=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_checkpoints_load_and_foreign_ones_are_refused(tmp_path):
    path = tmp_path / 'pelk.pth'
    model = small()
    with torch.no_grad():
        model.stages[0].position_embedding.normal_()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in model.state_dict().items()}}, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    loaded = PeLK(**SMALL, init_cfg=init_cfg)
    loaded.init_weights()
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    other = PeLK(**{**SMALL, 'center': 5}, init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'weights are of another architecture.*peripheral.weight'):
        other.init_weights()


def test_layer_ids():
    with torch.device('meta'):
        tiny, base = PeLK('tiny'), PeLK('base')
    expected = {
        'downsample_layers.0.0.weight': (0, 0),
        'stages.0.position_embedding': (1, 1),
        'stages.0.2.large_kernel.peripheral.weight': (1, 1),
        'stages.2.position_embedding': (3, 3),
        'stages.2.8.pwconv1.weight': (5, 5),
        'stages.3.position_embedding': (6, 12),
        'norm0.weight': (7, 13),
    }
    for name, (in_tiny, in_base) in expected.items():
        assert tiny.get_layer_depth(f'backbone.{name}', 'backbone.') == (in_tiny, 8)
        assert base.get_layer_depth(f'backbone.{name}', 'backbone.') == (in_base, 14)
    names = [f'backbone.{name}' for name, _ in tiny.named_parameters()]
    outside = [n for n in names if tiny.get_layer_depth(n, 'backbone.')[0] == 7]
    assert all(re.match(r'backbone\.norm\d\.', n) for n in outside)


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_layer_decay(decay_type):
    model = nn.ModuleDict(dict(backbone=small()))
    model.backbone = model['backbone']
    wrapper = LayerDecayOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0)),
        dict(decay_type=decay_type, decay_rate=0.5),
    )(model)
    rates = {id(p): group['lr'] for group in wrapper.param_groups for p in group['params']}
    for stage in model.backbone.stages:
        assert rates[id(stage.position_embedding)] == rates[id(stage[0].pwconv1.weight)] < 1
    assert all(id(p) in rates for p in model.parameters())


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = PeLK(
            arch=dict(depths=[1, 1], dims=[8, 16]),
            kernel_sizes=(9, 7),
            center=3,
            small_kernel=3,
            width_factor=1.0,
            layer_scale_init_value=1.0,
            out_indices=1,
            gap_before_final_norm=True,
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x, y, mode='tensor'):
        logits = self.head(self.backbone(x)[0])
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def test_sparse_training_masks_the_shared_weights(tmp_path):
    """Zeros of shared weights are whole rectangles of zeros of the dense kernel, as trained."""
    torch.manual_seed(0)
    runner = train(
        tmp_path,
        dict(sparsity=0.4, init='uniform', exclude=r'^head\.', update_interval=3),
        model=Classifier(),
        data=Data(),
    )
    model, masks = runner.model, hook_of(runner).masks
    name = 'backbone.stages.0.0.large_kernel.peripheral.weight'
    conv = model.get_submodule(name.removesuffix('.weight'))
    assert conv.weight.shape == (3, 1, 7, 7)  # a grid of 1, 2, 1, 1, 1, 2, 1
    assert torch.equal(conv.weight != 0, masks.active[name])
    assert int((conv.weight != 0).sum()) == masks.nnz[name] == round(0.6 * 147)
    assert 'backbone.stages.0.0.large_kernel.small.weight' in masks.active
    assert not any('embedding' in n or 'bn' in n for n in masks.active)
    kernel = conv.kernel()
    shared = [i for i, width in enumerate(conv.grid) for _ in range(width)]
    assert torch.equal(kernel != 0, masks.active[name][:, :, shared][..., shared])


def test_type_resolves_from_any_scope():
    assert isinstance(MMENGINE_MODELS.build(dict(type='mmslak.PeLK', **SMALL)), PeLK)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='huge'), "unknown arch 'huge': expected tiny, small, base"),
        (dict(kernel_sizes=(51, 49)), r'kernel_sizes: expected one per stage \(4\)'),
        (dict(kernel_sizes=(50, 49, 47, 13)), 'must be odd'),
        (dict(kernel_sizes=51), r'kernel_sizes: expected one per stage \(4\), got 51'),
        (dict(norm_cfg=dict(type='LN')), "norm_cfg: expected a norm of .*, got 'LN'"),
        (dict(center=4), 'must be odd'),
        (dict(center=9), 'center not larger, got 7 and 9'),
        (dict(small_kernel=4), 'small_kernel must be odd'),
        (dict(small_kernel=7), 'smaller than the kernel, got 7 and 7'),
        (dict(conv_ratio=0.01), 'conv_ratio: expected a share of 10 channels'),
        (dict(conv_ratio=1.5), 'conv_ratio: expected a share of 10 channels'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PeLK(**{**SMALL, **options})
