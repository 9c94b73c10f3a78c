import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmslak.checkpoints.files import read_state_dict
from mmslak.errors import CheckpointError
from mmslak.models import SLaK
from tests.golden import GOLDEN, SLAK_FILES, slak_expected, slak_options

SMALL = dict(arch=dict(depths=[1, 1, 4, 1], dims=[8, 12, 16, 24]), kernel_sizes=(13, 11, 9, 7))
FORMS = {
    'decomposed': dict(),
    'square': dict(decomposed=False),
    'convnext': dict(decomposed=False, small_kernel=None),
}


def small(**options) -> SLaK:
    torch.manual_seed(0)
    return SLaK(**{**SMALL, 'layer_scale_init_value': 1.0, **options})


def relative_error(got, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def randomise_norms(model: nn.Module) -> None:
    """Statistics and affine parameters as after some training: something to fuse."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.normal_()
            module.bias.normal_()


@pytest.mark.parametrize(
    ('arch', 'parameters'), [('tiny', 50703838), ('small', 91131820), ('base', 157950792)]
)
def test_parameters_of_the_published_models(arch, parameters):
    with torch.device('meta'):
        model = SLaK(arch, out_indices=(3,), gap_before_final_norm=True)
        head = nn.Linear(model.channels[-1], 1000)
    assert sum(p.numel() for m in (model, head) for p in m.parameters()) == parameters


@pytest.mark.parametrize(
    ('arch', 'channels'),
    [
        ('tiny', [124, 249, 499, 998]),
        ('small', [124, 249, 499, 998]),
        ('base', [166, 332, 665, 1331]),
    ],
)
def test_channels(arch, channels):
    with torch.device('meta'):
        assert SLaK(arch).channels == channels


@pytest.mark.parametrize('name', SLAK_FILES)
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('backend', ['auto', 'native', 'fft', 'toeplitz'])
def test_outputs_equal_the_reference(name, deploy, backend):
    checkpoint = str(GOLDEN / f'{name}.pth')
    model = SLaK(
        **slak_options(name),
        conv_backend=backend,
        out_indices=(3,),
        gap_before_final_norm=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
    model.init_weights()
    model.eval()
    if deploy:
        model.switch_to_deploy()
    expected = slak_expected(name)
    stages = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _m, _x, out, i=i: stages.update({f'stage{i}': out}))
    head = read_state_dict(checkpoint)
    with torch.no_grad():
        (features,) = model(torch.from_numpy(expected.pop('input')))
    logits = features @ head['head.weight'].T + head['head.bias']
    got = {**stages, 'logits': logits}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(got[key], value) <= 1e-5, key


@pytest.mark.parametrize('form', FORMS)
def test_feature_maps(form):
    model = small(**FORMS[form])
    outputs = model(torch.randn(2, 3, 64, 96))
    assert [tuple(o.shape) for o in outputs] == [
        (2, 10, 16, 24),
        (2, 15, 8, 12),
        (2, 20, 4, 6),
        (2, 31, 2, 3),
    ]
    assert all(o.is_contiguous() for o in outputs)
    sum(o.sum() for o in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_are_the_official_ones():
    names = set(small().state_dict())
    for name in (
        'downsample_layers.0.0.weight',
        'stages.2.3.large_kernel.vertical.conv.weight',
        'stages.0.0.large_kernel.horizontal.bn.running_mean',
        'stages.0.0.large_kernel.small.conv.weight',
        'stages.0.0.pwconv1.weight',
        'stages.0.0.gamma',
        'norm3.weight',
    ):
        assert name in names
    assert 'stages.0.0.large_kernel.square.conv.weight' in small(decomposed=False).state_dict()


def test_strips_are_rectangles_with_their_own_padding():
    kernel = small().stages[0][0].large_kernel
    assert kernel.vertical.conv.kernel_size == (13, 5)
    assert kernel.vertical.conv.padding == (6, 2)
    assert kernel.horizontal.conv.kernel_size == (5, 13)
    assert kernel.horizontal.conv.padding == (2, 6)


@pytest.mark.parametrize(
    ('out_indices', 'channels'), [((0, 2), [10, 20]), (3, [31]), (-1, [31]), ((2, 0), [20, 10])]
)
def test_out_indices(out_indices, channels):
    outputs = small(out_indices=out_indices)(torch.randn(2, 3, 32, 32))
    assert [o.shape[1] for o in outputs] == channels


def test_pooling_before_the_final_norm():
    model = small(out_indices=-1, gap_before_final_norm=True).eval()
    maps = {}
    model.stages[3].register_forward_hook(lambda _m, _x, out: maps.update(last=out))
    x = torch.randn(2, 3, 64, 64)
    (pooled,) = model(x)
    expected = nn.functional.layer_norm(maps['last'].mean((2, 3)), (31,), eps=1e-6)
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize('form', FORMS)
def test_deployed_form_gives_the_same_outputs(form):
    model = small(**FORMS[form]).eval()
    randomise_norms(model)
    x = torch.randn(2, 3, 64, 64)
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


def test_fusing_needs_batch_norm():
    with pytest.raises(TypeError, match='only batch norm can be fused'):
        small(norm_cfg=dict(type='GN', num_groups=1)).switch_to_deploy()


@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_checkpointing_changes_nothing(norm):
    """Same outputs, gradients and running statistics, drop path included."""
    models = [
        small(with_cp=with_cp, drop_path_rate=0.5, norm_cfg=dict(type=norm, requires_grad=True))
        for with_cp in (False, True)
    ]
    x = torch.randn(2, 3, 32, 32)
    results = []
    for model in models:
        torch.manual_seed(1)
        image = x.clone().requires_grad_()
        outputs = model(image)
        sum((o**2).sum() for o in outputs).backward()
        results.append([*outputs, image.grad, *(p.grad for p in model.parameters())])
        results[-1] += list(model.buffers())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen):
    model = small(frozen_stages=frozen)
    model.train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert ('downsample_layers.0.0.weight' in trained) == (frozen < 0)
    for i in range(4):
        assert (f'stages.{i}.0.pwconv1.weight' in trained) == (frozen <= i)
        assert (f'norm{i}.weight' in trained) == (frozen <= i)
        assert model.stages[i].training == (frozen <= i)
        if i > 0:
            assert (f'downsample_layers.{i}.1.weight' in trained) == (frozen <= i)


def test_norm_eval_keeps_the_statistics():
    model = small(norm_eval=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.stages[0].training


def test_sync_bn_works_on_one_process_on_cpu():
    model = small(norm_cfg=dict(type='SyncBN', requires_grad=True))
    x = torch.randn(2, 3, 32, 32)
    expected = small()(x)
    got = model(x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    sum(o.sum() for o in got).backward()
    model.eval()
    model.switch_to_deploy()


def test_drop_path_rises_to_the_given_rate():
    model = small(drop_path_rate=0.6)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.parametrize('value', [0, 1e-6])
def test_layer_scale(value):
    block = small(layer_scale_init_value=value).stages[0][0]
    assert (block.gamma is None) if value == 0 else bool((block.gamma == value).all())


def test_layer_ids_equal_the_published_recipe():
    with torch.device('meta'):
        tiny, base = SLaK('tiny'), SLaK('base')
    expected = {
        'downsample_layers.0.0.weight': (0, 0),
        'stages.0.2.gamma': (1, 1),
        'downsample_layers.1.1.weight': (2, 2),
        'stages.1.0.norm.weight': (2, 2),
        'downsample_layers.2.1.weight': (3, 3),
        'stages.2.0.pwconv1.weight': (3, 3),
        'stages.2.2.pwconv1.weight': (3, 3),
        'stages.2.3.pwconv1.weight': (4, 4),
        'stages.2.8.pwconv1.weight': (5, 5),
        'downsample_layers.3.1.bias': (6, 12),
        'stages.3.2.large_kernel.vertical.conv.weight': (6, 12),
        'norm0.weight': (7, 13),
    }
    for name, (in_tiny, in_base) in expected.items():
        assert tiny.get_layer_depth(f'backbone.{name}', 'backbone.') == (in_tiny, 8)
        assert base.get_layer_depth(f'backbone.{name}', 'backbone.') == (in_base, 14)
    assert base.get_layer_depth('backbone.stages.2.26.gamma', 'backbone.') == (11, 14)
    assert tiny.get_layer_depth('decode_head.stages.0.0.weight', 'backbone.') == (7, 8)


def test_type_resolves_from_any_scope():
    model = MMENGINE_MODELS.build(dict(type='mmslak.SLaK', **SMALL))
    assert isinstance(model, SLaK)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='huge'), "unknown arch 'huge': expected tiny, small, base"),
        (dict(arch=dict(depths=[1], dims=[8, 16])), 'of equal length'),
        (dict(kernel_sizes=(51, 49)), r'kernel_sizes: expected one per stage \(4\)'),
        (dict(kernel_sizes=51), r'kernel_sizes: expected one per stage \(4\), got 51'),
        (dict(norm_cfg=dict(type='LN')), "norm_cfg: expected a norm of .*, got 'LN'"),
        (dict(norm_cfg=dict(type='BN1d')), "norm_cfg: expected a norm of .*, got 'BN1d'"),
        (dict(kernel_sizes=(50, 49, 47, 13)), 'kernel sides must be odd'),
        (dict(small_kernel=None), 'needs small_kernel'),
        (dict(small_kernel=13), 'smaller than the kernel'),
        (dict(out_indices=(4,)), 'out_indices: expected some of 0 to 3'),
        (dict(frozen_stages=5), 'frozen_stages: expected -1 to 4'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SLaK(**{**SMALL, **options})


@pytest.mark.parametrize(
    'norm_cfg', [dict(type='GN', num_groups=1), dict(type='IN'), dict(type='mmpretrain.LN2d')]
)
def test_other_norms_of_feature_maps(norm_cfg):
    small(norm_cfg=norm_cfg)(torch.randn(1, 3, 64, 64))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        small(conv_backend='cudnn')(torch.randn(1, 3, 32, 32))


def test_a_list_of_init_cfg_is_as_strict(tmp_path):
    source = small()
    state = source.state_dict()
    torch.save({'state_dict': state}, tmp_path / 'fits.pth')
    state.pop('stages.0.0.gamma')
    torch.save({'state_dict': state}, tmp_path / 'lacks.pth')
    constant = dict(type='Constant', layer='Linear', val=0.25, bias=0.5)

    def load(name: str, *others: dict) -> SLaK:
        pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / name))
        model = small(init_cfg=[pretrained, *others], layer_scale_init_value=0.5)
        model.init_weights()
        return model

    with pytest.raises(CheckpointError, match=r'1 missing in the file \(stages\.0\.0\.gamma\)'):
        load('lacks.pth')
    model = load('fits.pth', constant)  # weights come last
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    assert len(model.init_cfg) == 2


def test_any_other_init_cfg_is_mmengines():
    model = small(init_cfg=dict(type='Constant', layer='Linear', val=0.25, bias=0.5))
    model.init_weights()
    assert bool((model.stages[0][0].pwconv1.weight == 0.25).all())
