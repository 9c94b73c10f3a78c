"""Which layers have hidden units between them, which have not and why, and the check by numbers."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from mmslak.sparsity import HiddenLayer, find_hidden_layers, find_in_state, probe

PAIRS = {r'(.*)\.fc_in': r'\1.fc_out'}


class Mlp(nn.Module):
    """fc_in, whatever is `between`, and fc_out."""

    def __init__(self, *between: nn.Module, hidden: int = 6, **changes: nn.Module) -> None:
        super().__init__()
        self.fc_in = nn.Linear(4, hidden)
        self.between = nn.Sequential(*between)
        self.fc_out = nn.Linear(hidden, 3)
        for name, module in changes.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.between(self.fc_in(x)))


class Residual(Mlp):
    """What the hidden units become is added to them, and read by fc_out."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc_in(x)
        return self.fc_out(F.relu(x)) + x[..., :3]


class Holder(nn.Module):
    """One block of some model."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Timm(nn.Module):
    """Names of timm's Mlp."""

    def __init__(self, norm: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.norm = nn.Conv2d(4, 6, 1), act or nn.SiLU(), norm
        self.fc2 = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


def ffn(*between: nn.Module) -> nn.Module:
    """Names of mmcv's FFN."""
    model = nn.Module()
    first = nn.Sequential(nn.Linear(4, 8), *between)
    model.layers = nn.Sequential(first, nn.Linear(8, 4), nn.Dropout(0.1))
    return model


def grouped() -> Mlp:
    return Mlp(fc_in=nn.Conv2d(4, 6, 1, groups=2), fc_out=nn.Conv2d(6, 3, 1))


def shared() -> Mlp:
    model = Mlp(hidden=4)
    model.other = nn.Linear(4, 4)
    model.other.weight = model.fc_in.weight
    return model


def pruned() -> Mlp:
    model = Mlp()
    prune.identity(model.fc_out, 'weight')
    return model


def with_scale() -> Mlp:
    model = Mlp(nn.GELU())
    model.scale = nn.Parameter(torch.ones(6))
    return model


def test_entries_of_a_unit():
    layer = HiddenLayer('a.one', 'a.two')
    assert layer.entries == (('a.one.weight', 0), ('a.one.bias', 0), ('a.two.weight', 1))
    assert HiddenLayer('one', 'two', bias=False).entries == (('one.weight', 0), ('two.weight', 1))


def test_pairs_that_are_given():
    model = nn.Sequential(Mlp(nn.ReLU()), Mlp())
    with pytest.raises(ValueError, match='Sequential has no hidden units that are found by name'):
        find_hidden_layers(model)
    assert find_hidden_layers(model, PAIRS) == [
        HiddenLayer('0.fc_in', '0.fc_out'),
        HiddenLayer('1.fc_in', '1.fc_out'),
    ]
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Dropout(), nn.Tanh(), nn.Linear(3, 2))
    assert find_hidden_layers(model, {'0': '3'}) == [HiddenLayer('0', '3', model[2], False)]
    model.insert(3, nn.ReLU())  # both are one function, but none that has a name
    assert find_hidden_layers(model, {'0': '4'}) == [HiddenLayer('0', '4', None, False)]


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (lambda: Mlp(nn.LayerNorm(6)), 'block.between.0.weight has one value for each of the 6'),
        (lambda: Mlp(nn.BatchNorm1d(6, affine=False)), 'block.between.0.running_mean has one'),
        (lambda: Mlp(dw=nn.Conv1d(6, 6, 3, groups=6)), 'block.dw.weight has one value for each'),
        (with_scale, 'block.scale has one value for each of the 6 units: does it act on them?'),
        (
            grouped,
            r'block.fc_in is neither nn.Linear nor a 1×1 nn.Conv2d of one group, but Conv2d\(',
        ),
        (lambda: Mlp(fc_out=nn.Conv2d(6, 3, 3)), 'block.fc_out is neither nn.Linear nor'),
        (lambda: Mlp(fc_out=nn.Linear(3, 3)), 'block.fc_in has 6 outputs, block.fc_out has 3 in'),
        (shared, 'block.fc_in shares its weight with another layer'),
        (pruned, 'block.fc_out computes its weight'),
        (lambda: Mlp(fc_out=None), 'there is no layer block.fc_out'),
    ],
)
def test_what_is_refused_and_why(make, reason):
    message = f'no hidden units between block.fc_in and block.fc_out: {reason}'
    with pytest.raises(ValueError, match=message):
        find_hidden_layers(Holder(make()), PAIRS)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=re.escape(r"pairs: no layer of Mlp is called '.*\\.up'")):
        find_hidden_layers(Mlp(), {r'.*\.up': 'down'})


def test_a_chain_is_two_pairs_and_a_layer_that_reads_two_is_refused():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    layers = find_hidden_layers(model, {'0': '1', '1': '2'})
    assert [(layer.first, layer.second) for layer in layers] == [('0', '1'), ('1', '2')]
    with pytest.raises(ValueError, match='between 1 and 2: 2 belongs to another pair'):
        find_hidden_layers(model, {'[01]': '2'})


@pytest.mark.parametrize('pairs', [{'(0': '1'}, {'(0)': r'\2'}])
def test_a_wrong_regular_expression(pairs):
    with pytest.raises(ValueError, match=r'pairs: .* in the regular expressions \{'):
        find_hidden_layers(nn.Sequential(nn.Linear(2, 2)), pairs)


def test_known_names_and_their_activations():
    model = nn.ModuleDict(dict(a=ffn(nn.ReLU(), nn.Dropout(0.1)), b=Timm(nn.Identity()), c=Mlp()))
    relu = model['a'].layers[0][1]
    assert find_hidden_layers(model) == [
        HiddenLayer('a.layers.0.0', 'a.layers.1', relu),
        HiddenLayer('b.fc1', 'b.fc2', model['b'].act),
    ]
    (layer,) = find_hidden_layers(ffn(nn.Softmax(-1)))
    assert layer.activation is None
    assert find_hidden_layers(ffn())[0].activation is None


def test_known_names_with_a_norm_between_are_left_out():
    normed = Timm(nn.GroupNorm(1, 6))
    with pytest.raises(ValueError, match=r'fc1 and fc2: norm\.weight has one value for each'):
        find_hidden_layers(normed)
    model = nn.ModuleDict(dict(a=normed, b=Timm(nn.Identity())))
    with pytest.warns(UserWarning, match='no hidden units between a.fc1 and a.fc2: a.norm.weight'):
        assert [layer.first for layer in find_hidden_layers(model)] == ['b.fc1']


def test_backbones_of_the_libraries():
    from mmpretrain.models import backbones

    import mmslak.models

    arch = dict(depths=[1, 1], channels=[8, 16])
    model = backbones.ConvNeXt(arch, out_indices=(0, 1))
    first, second = find_hidden_layers(model)
    assert (first.first, first.second) == (
        'stages.0.0.pointwise_conv1',
        'stages.0.0.pointwise_conv2',
    )
    assert second.activation is model.stages[1][0].act
    assert type(second.activation) is nn.GELU
    with pytest.raises(ValueError, match=r'stages\.0\.0\.grn.gamma has one value for each'):
        find_hidden_layers(backbones.ConvNeXt(arch, use_grn=True, layer_scale_init_value=0.0))
    for model, depth in (
        (backbones.SwinTransformer('tiny'), 12),
        (backbones.VisionTransformer('deit-t', img_size=32, patch_size=16), 12),
        (mmslak.models.SLaK(), 18),
        (mmslak.models.PeLK(), 18),
    ):
        layers = find_hidden_layers(model)
        assert len(layers) == depth
        assert {type(layer.activation) for layer in layers} == {nn.GELU}
        in_state = find_in_state(model.state_dict())
        assert [layer.entries for layer in in_state] == [layer.entries for layer in layers]
        ours = type(model).__module__.startswith('mmslak.')
        assert {layer.activation for layer in in_state} == {F.gelu if ours else None}


def test_as_many_hidden_units_as_channels_are_no_norm():
    from mmslak.models import SLaK

    arch = dict(depths=[1], dims=[8])
    model = SLaK(arch, kernel_sizes=(7,), width_factor=1.0, hidden_channels=[[8]], out_indices=0)
    (layer,) = find_hidden_layers(model)
    assert find_in_state(model.state_dict())[0].entries == layer.entries


def test_names_in_a_file_with_a_norm_between():
    state = {'a.fc1.weight': torch.ones(3, 2), 'a.fc2.weight': torch.ones(2, 3)}
    assert find_in_state(state) == [HiddenLayer('a.fc1', 'a.fc2', None, False)]
    assert find_in_state(state, 'b.') == []
    assert find_in_state(state | {'a.norm.weight': torch.ones(3)}) == []
    assert find_in_state(state | {'a.fc2.weight': torch.ones(2, 4)}) == []


@pytest.mark.parametrize('between', [(), (nn.ReLU(),), (nn.GELU(), nn.Dropout(0.5))])
def test_the_probe_passes_elementwise_functions(between):
    model = nn.Sequential(Mlp(*between), nn.ReLU(), nn.Linear(3, 4), Mlp(nn.Sigmoid()))
    model[1].train()
    probe(model, find_hidden_layers(model, PAIRS), lambda: dict(y=[model(torch.ones(2, 4))]))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_probe_of_convolutions_and_of_a_layer_that_is_called_twice():
    model, x = Timm(nn.Identity()), torch.randn(2, 4, 5, 5)
    probe(model, find_hidden_layers(model), lambda: model(model(x)))


@pytest.mark.parametrize(
    ('block', 'reason'),
    [
        (Mlp(nn.LayerNorm(6)), 'the units are mixed between them, by a norm for example'),
        (Mlp(nn.Softmax(-1)), 'the units are mixed between them'),
        (Residual(), 'the units are read elsewhere too, by a residual for example'),
        (Mlp(nn.Threshold(1e9, 0.0)), 'the units do not reach the second layer'),
    ],
)
def test_the_probe_names_the_layer_and_the_reason(block, reason):
    torch.manual_seed(0)
    for layer in (block.fc_in, block.fc_out):  # made before, of other random numbers
        layer.reset_parameters()
    model = nn.Sequential(Mlp(), nn.Linear(3, 4), block, nn.Linear(3, 4), Mlp(nn.ReLU()))
    layers = [HiddenLayer(f'{i}.fc_in', f'{i}.fc_out') for i in (0, 2, 4)]
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=f'between 2.fc_in and 2.fc_out: {reason}'):
        probe(model, layers, lambda: model(x))
    probe(model, layers[::2], lambda: model(x))


class Behind(nn.Module):
    """Two blocks; the second one also reads hidden units of the first, and all its ReLUs are off.

    The units are added to its input, or to its own hidden units.
    """

    def __init__(self, to_input: bool) -> None:
        super().__init__()
        self.a, self.b = Mlp(nn.ReLU()), Mlp(nn.ReLU(), fc_in=nn.Linear(3, 6))
        self.to_input = to_input
        nn.init.constant_(self.b.fc_in.bias, -1e6)

    def forward(self, x: Tensor) -> Tensor:
        units = self.a.fc_in(x)
        y = self.a.fc_out(self.a.between(units))
        if self.to_input:
            return self.b(y + units[..., :3])
        return self.b.fc_out(self.b.between(self.b.fc_in(y) + units))


@pytest.mark.parametrize('to_input', [True, False])
def test_the_probe_finds_what_activations_of_another_pair_hide(to_input):
    model, x = Behind(to_input), torch.randn(5, 4)
    layers = find_hidden_layers(model, PAIRS)
    message = 'no hidden units between a.fc_in and a.fc_out: the units are read elsewhere too'
    for some in (layers, layers[::-1], layers[:1]):
        with pytest.raises(ValueError, match=message):
            probe(model, some, lambda: model(x))
    probe(model, layers[1:], lambda: model(x))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_probe_finds_what_is_detached():
    class Detached(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc_in(x)
            return self.fc_out(x.relu()) + x[..., :3].detach()

    model, x = Detached(), torch.randn(5, 4)
    with pytest.raises(ValueError, match='the units are read elsewhere too'):
        probe(model, [HiddenLayer('fc_in', 'fc_out')], lambda: model(x))


def test_the_probe_finds_a_wrong_activation():
    model, x = Mlp(nn.ReLU()), torch.randn(5, 4)
    probe(model, [HiddenLayer('fc_in', 'fc_out', nn.ReLU())], lambda: model(x))
    with pytest.raises(ValueError, match=r'what stands between them is not GELU'):
        probe(model, [HiddenLayer('fc_in', 'fc_out', nn.GELU())], lambda: model(x))


def test_the_probe_needs_a_run_of_the_model():
    model = Mlp()
    layers = [HiddenLayer('fc_in', 'fc_out')]
    with pytest.raises(ValueError, match=r'run\(\) does not call the second layer after the first'):
        probe(model, layers, lambda: model.fc_in(torch.ones(1, 4)))
    with pytest.raises(ValueError, match='expected a function that returns tensors'):
        probe(model, layers, lambda: None)
    with pytest.raises(ValueError, match=r'run\(\) does not give the same output twice'):
        probe(model, layers, lambda: model(torch.randn(1, 4)))


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        find_hidden_layers(nn.ModuleDict(dict(a=Timm(nn.Identity()), fc1=nn.Linear(2, 2))))
