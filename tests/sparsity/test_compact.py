"""Dead hidden units go, and outputs stay: literal cases, and properties of all that can be dead."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmslak.sparsity import compact_, compact_pair, compact_state, narrow_

ACTIVATIONS = (F.gelu, torch.relu, torch.sigmoid, torch.tanh)


def mlp(x, weight1, bias1, weight2, bias2, activation) -> Tensor:
    return F.linear(activation(F.linear(x, weight1, bias1)), weight2, bias2)


@st.composite
def cases(draw):
    """Two layers, of whose units some have a zero row, a zero column, both, or all but one have."""
    inputs, outputs, hidden = (draw(st.integers(1, 5)) for _ in range(3))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    weight1, weight2 = torch.randn(hidden, inputs), torch.randn(outputs, hidden)
    bias1, bias2 = (torch.randn(n) if draw(st.booleans()) else None for n in (hidden, outputs))
    kinds = draw(st.lists(st.sampled_from('rcb-'), min_size=hidden, max_size=hidden))
    alive = draw(st.integers(-1, hidden - 1))  # all but this one are dead; -1 leaves it to chance
    for unit, kind in enumerate(kinds):
        kind = '-' if unit == alive else 'b' if alive >= 0 and kind == '-' else kind
        if kind in 'rb':
            weight1[unit] = 0
        if kind in 'cb':
            weight2[:, unit] = 0
    return weight1, bias1, weight2, bias2, draw(st.sampled_from(ACTIVATIONS))


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6)]))
def test_outputs_stay(case, precision):
    *tensors, activation = case
    dtype, tolerance = precision
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    before = [None if t is None else t.clone() for t in tensors]
    keep, *compact = compact_pair(*tensors, activation)
    x = torch.randn(7, tensors[0].shape[1], dtype=dtype)
    expected, found = mlp(x, *tensors, activation), mlp(x, *compact, activation)
    assert (found - expected).abs().max() <= tolerance * (1 + expected.abs().max())
    assert all(a is b or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    weight1, bias1, weight2, bias2 = tensors
    unused = (weight2 == 0).all(0)
    constant = (weight1 == 0).all(1)
    if bias2 is None:
        values = activation(weight1.new_zeros(len(weight1)) if bias1 is None else bias1)
        constant &= values == 0
    left = int((~(unused | constant)).sum())
    assert int(keep.sum()) == max(1, left)
    assert compact[0].shape == (max(1, left), weight1.shape[1])
    assert torch.equal(compact[0], weight1[keep])
    assert torch.equal(compact[2], weight2[:, keep])
    again, *twice = compact_pair(*compact, activation)
    assert again.all()
    assert all(a is b for a, b in zip(twice, compact, strict=True))


def literal() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Units: alive, constant, unused, constant and unused."""
    weight1 = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    weight2 = torch.tensor([[5.0, 6.0, 0.0, 0.0], [7.0, 8.0, 0.0, 0.0]])
    return weight1, torch.tensor([1.0, 2.0, 3.0, 4.0]), weight2, torch.tensor([10.0, 20.0])


def listed(tensors) -> list:
    return [None if t is None else t.tolist() for t in tensors]


def test_a_constant_goes_into_the_bias():
    assert listed(compact_pair(*literal(), torch.relu)) == [
        [True, False, False, False],
        [[1.0, 2.0]],
        [1.0],
        [[5.0], [7.0]],
        [10.0 + 6.0 * 2.0, 20.0 + 8.0 * 2.0],
    ]


@pytest.mark.parametrize('lost', ['activation', 'bias2'])
def test_a_constant_that_has_nowhere_to_go_stays(lost):
    weight1, bias1, weight2, bias2 = literal()
    bias2 = None if lost == 'bias2' else bias2
    found = compact_pair(
        weight1, bias1, weight2, bias2, None if lost == 'activation' else torch.relu
    )
    assert found[0].tolist() == [True, True, False, False]
    assert found[4] is bias2


def test_without_biases_zero_is_a_constant_of_gelu_and_not_of_sigmoid():
    weight1, _, weight2, bias2 = literal()
    for activation, left in ((F.gelu, [0]), (torch.sigmoid, [0, 1])):
        keep, *_ = compact_pair(weight1, None, weight2, None, activation)
        assert keep.nonzero().flatten().tolist() == left
    *_, bias = compact_pair(weight1, None, weight2, bias2, torch.sigmoid)
    assert bias.tolist() == [10.0 + 6.0 / 2, 20.0 + 8.0 / 2]


def test_one_unit_stays_and_is_counted_once():
    weight1, bias1, weight2, bias2 = literal()
    keep, *compact = compact_pair(weight1[1:2], bias1[1:2], weight2[:, 1:2], bias2, torch.relu)
    assert keep.tolist() == [True]
    assert listed(compact) == listed([weight1[1:2], bias1[1:2], weight2[:, 1:2], bias2])


def test_small_numbers_are_no_zeros_and_minus_zero_is_one():
    weight1 = torch.tensor([[1e-45], [-0.0]])
    keep, *_ = compact_pair(weight1, None, torch.ones(1, 2), None, torch.relu)
    assert keep.tolist() == [True, False]


def test_an_activation_in_place_leaves_the_bias():
    weight1, bias1, weight2, bias2 = (t.double() for t in literal())
    bias1.neg_()
    compact_pair(weight1, bias1, weight2, bias2, nn.ReLU(inplace=True))
    assert bias1.tolist() == [-1.0, -2.0, -3.0, -4.0]


class Block(nn.Module):
    """1×1 convolutions with names that are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act = nn.Conv2d(2, 4, 1), nn.ReLU()
        self.down = nn.Conv2d(4, 2, 1)
        weight1, bias1, weight2, bias2 = literal()
        with torch.no_grad():
            self.up.weight.copy_(weight1[:, :, None, None])
            self.up.bias.copy_(bias1)
            self.down.weight.copy_(weight2[:, :, None, None])
            self.down.bias.copy_(bias2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def test_a_model_in_place():
    model = Block().bfloat16()
    model.up.requires_grad_(False)
    model.act.eval()
    assert compact_(model, {'up': 'down'}) == {'up': 1}
    assert (model.up.out_channels, model.down.in_channels) == (1, 1)
    assert (model.up.in_channels, model.down.out_channels) == (2, 2)
    assert model.down.bias.tolist() == [22.0, 36.0]
    parameters = dict(model.named_parameters())
    assert {name: (p.dtype, p.requires_grad) for name, p in parameters.items()} == {
        'up.weight': (torch.bfloat16, False),
        'up.bias': (torch.bfloat16, False),
        'down.weight': (torch.bfloat16, True),
        'down.bias': (torch.bfloat16, True),
    }
    assert (model.training, model.act.training) == (True, False)
    assert model(torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)).shape == (1, 2, 3, 3)


def test_what_is_alive_stays_the_same_parameter():
    model = Block()
    nn.init.ones_(model.up.weight)
    nn.init.ones_(model.down.weight)
    before = list(model.parameters())
    assert compact_(model, {'up': 'down'}) == {'up': 4}
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_tensors_of_a_file():
    weight1, bias1, weight2, bias2 = literal()
    state = {
        'a.stages.0.0.pwconv1.weight': weight1,
        'a.stages.0.0.pwconv1.bias': bias1,
        'a.stages.0.0.pwconv2.weight': weight2,
        'a.stages.0.0.pwconv2.bias': bias2,
        'a.stages.0.0.gamma': torch.ones(2),
    }
    kept, widths = compact_state(state)
    assert widths == {'a.stages.0.0.pwconv1': 2}  # what the activation is, nobody knows
    assert state['a.stages.0.0.pwconv1.weight'] is weight1
    kept, widths = compact_state(state | {'a.stages.0.0.large_kernel.x': torch.ones(1)})
    assert widths == {'a.stages.0.0.pwconv1': 1}
    gelu = F.gelu(torch.tensor(2.0)).item()
    expected = torch.tensor([10 + 6 * gelu, 20 + 8 * gelu])
    torch.testing.assert_close(kept['a.stages.0.0.pwconv2.bias'], expected)
    assert list(kept)[:5] == list(state)


def test_narrowing_makes_room_for_a_compact_file():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)

    model, narrow = nn.Sequential(Mlp(), Mlp()), nn.Sequential(Mlp(), Mlp())
    with torch.no_grad():
        model[0].fc1.weight[:3] = 0
    widths = compact_(model)
    assert widths == {'0.fc1': 1, '1.fc1': 4}
    narrow_(narrow, list(widths.values()))
    narrow.load_state_dict(copy.deepcopy(model.state_dict()))
    assert (narrow[0].fc1.out_features, narrow[0].fc2.in_features) == (1, 1)
    for wrong in ([1], [0, 4], [1, 5]):
        message = r'hidden_channels: expected 2 numbers from 1 to at most \[1, 4\], got \['
        with pytest.raises(ValueError, match=message):
            narrow_(narrow, wrong)
