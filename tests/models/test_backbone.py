"""What the base asks of a model and gives to it: arguments, channels and strides."""

import copy
import inspect
import pickle

import pytest
import torch
from mmengine.config import Config

from mmslak.apis.config import accepted_arguments
from mmslak.apis.options import apply_options
from mmslak.errors import UserError
from mmslak.models import LargeKernelBackbone, PeLK, SLaK
from mmslak.registry import MODELS

COMMON = dict(
    in_channels=3,
    kernel_sizes=(51, 49, 47, 13),
    width_factor=1.3,
    hidden_channels=None,
    out_indices=(0, 1, 2, 3),
    drop_path_rate=0.0,
    layer_scale_init_value=1e-6,
    norm_cfg=None,
    gap_before_final_norm=False,
    frozen_stages=-1,
    norm_eval=False,
    with_cp=False,
    conv_backend='auto',
    init_cfg=None,
)
OWN = {
    SLaK: dict(small_kernel=5, decomposed=True),
    PeLK: dict(center=5, small_kernel=5, conv_ratio=3 / 8, strict_borders=False),
}
each_kind = pytest.mark.parametrize('kind', OWN)


class Narrow(SLaK):
    """As users derive one: an argument of its own, the others handed on."""

    def __init__(self, *args, halvings: int = 1, **kwargs) -> None:
        super().__init__(*args, width_factor=0.5**halvings, **kwargs)


def small(kind, **options):
    arch = dict(depths=[1, 1], dims=[8, 16])
    return kind(**{**dict(arch=arch, kernel_sizes=(9, 7), out_indices=(0, 1)), **options})


def defaults(kind) -> dict:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@each_kind
def test_arguments_and_defaults(kind):
    assert defaults(LargeKernelBackbone) == dict(arch='tiny', **COMMON)
    assert defaults(kind) == dict(arch='tiny', **OWN[kind])
    assert accepted_arguments(kind) == {'arch', *OWN[kind], *COMMON}
    for name in COMMON:
        assert f'{name},' in kind.__doc__ or f'{name}.' in kind.__doc__
        assert f'\n        {name}: ' in LargeKernelBackbone.__doc__


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (SLaK, dict(kernel_size=51), "SLaK.* 'kernel_size'; did you mean 'kernel_sizes'?"),
        (SLaK, dict(center=5), "SLaK.* 'center'"),
        (PeLK, dict(decomposed=True), "PeLK.* 'decomposed'"),
        (PeLK, dict(centre=5), "PeLK.* 'centre'; did you mean 'center'?"),
        (PeLK, dict(large_kernel=5), "PeLK.* 'large_kernel'; did you mean 'small_kernel'?"),
        (Narrow, dict(halving=2), "Narrow.* 'halving'; did you mean 'halvings'?"),
        (Narrow, dict(norm=None), "Narrow.* 'norm'; did you mean 'norm_cfg'?"),
    ],
)
def test_an_unknown_argument_names_the_users_class_and_the_nearest(kind, options, message):
    message = message.replace('.*', '.__init__() got an unexpected keyword argument')
    with pytest.raises(TypeError) as error:
        kind(**options)
    assert str(error.value) == message


def test_an_unknown_argument_in_a_config():
    with pytest.raises(TypeError, match=r"SLaK.*'kernel_size'; did you mean 'kernel_sizes'\?"):
        MODELS.build(dict(type='SLaK', kernel_size=51))
    cfg = Config(dict(model=dict(type='mmslak.SLaK', arch='tiny'), default_scope='mmslak'))
    apply_options(cfg, {'model.drop_path_rate': 0.1, 'model.small_kernel': 3})
    assert (cfg.model.drop_path_rate, cfg.model.small_kernel) == (0.1, 3)
    for name in ('center', 'large_kernel', 'unknown', 'kwargs'):
        with pytest.raises(UserError, match='no such key'):
            apply_options(cfg, {f'model.{name}': 5})


def test_arch_alone_is_positional():
    with torch.device('meta'):
        assert SLaK('small').depths == [3, 3, 27, 3]
    with pytest.raises(TypeError, match=r'^SLaK\.__init__\(\) takes from 1 to 2 positional'):
        SLaK('tiny', 3)


@each_kind
def test_copies_and_pickles(kind):
    model, x = small(kind).eval(), torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one, other in zip(twin(x), model(x), strict=True):
            assert torch.equal(one, other)


@each_kind
@pytest.mark.parametrize(
    ('out_indices', 'channels', 'strides'),
    [((0, 1), (10, 20), (4, 8)), ((1, 0), (20, 10), (8, 4)), (-1, (20,), (8,)), (0, (10,), (4,))],
)
def test_channels_and_strides_of_the_outputs(kind, out_indices, channels, strides):
    model = small(kind, out_indices=out_indices)
    assert (model.out_channels, model.strides) == (channels, strides)
    outputs = model(torch.randn(2, 3, 64, 32))
    for output, c, stride in zip(outputs, channels, strides, strict=True):
        assert output.shape == (2, c, 64 // stride, 32 // stride)


@each_kind
def test_a_picture_that_is_too_small_is_named(kind):
    model = small(kind)
    assert model(torch.zeros(2, 3, 8, 11))[1].shape[2:] == (1, 1)
    with pytest.raises(ValueError, match=f'{kind.__name__}: expected .* 8×8 pixels, got 7×64'):
        model(torch.zeros(2, 3, 7, 64))
