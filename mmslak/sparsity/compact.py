"""Compaction: hidden units that do nothing are taken out for good, and outputs stay."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmslak.sparsity.pairs import Activation, HiddenLayer, find_hidden_layers, find_in_state


def compact_pair(
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: Activation | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Takes the dead units out of the hidden layer activation(weight1 · x + bias1).

    A unit is dead if its column of weight2 is zero, or its row of weight1: then it is the constant
    activation(bias), and what it contributes goes into bias2, computed in float64. A unit whose
    constant is not zero stays where there is no bias2, and one whose constant is unknown stays. So
    does one unit at least.

    Args:
        weight1: (hidden, inputs), or (hidden, inputs, 1, 1) of a convolution.
        bias1: (hidden,) or None.
        weight2: (outputs, hidden), or (outputs, hidden, 1, 1).
        bias2: (outputs,) or None.
        activation: The elementwise function of the units; None if it is not known.

    Returns:
        Which units are left (hidden,), bool, on the CPU, and weight1, bias1, weight2 and bias2 of
        these, of the same dtypes on the same devices. What does not change is returned itself.
    """
    rows, columns = weight1.detach().flatten(1), weight2.detach().flatten(1)
    unused, constant = (columns == 0).all(0).cpu(), (rows == 0).all(1).cpu()
    values = torch.zeros(len(rows), dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    if activation is None:
        constant[:] = False
    elif constant.any():
        bias = values if bias1 is None else bias1.detach().cpu().double()
        values[constant] = activation(bias[constant])
        if bias2 is None:
            constant &= values == 0
    keep = ~(unused | constant)
    if not keep.any():
        keep[0] = True
    folded = constant & ~keep & (values != 0)
    if keep.all():
        return keep, weight1, bias1, weight2, bias2
    if folded.any():
        added = columns.cpu()[:, folded].double() @ values[folded]
        bias2 = (bias2.detach().cpu().double() + added).to(bias2)
    here = keep.to(weight1.device)
    bias1 = None if bias1 is None else bias1.detach()[here]
    return keep, weight1.detach()[here], bias1, weight2.detach()[:, here].contiguous(), bias2


def compact_state(
    state: Mapping[str, Tensor], layers: Iterable[HiddenLayer] | None = None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Takes the dead hidden units out of tensors by name, those of a file for example.

    Args:
        state: Tensors by name; they stay as they are.
        layers: The hidden layers; None for those of `mmslak.sparsity.pairs.find_in_state`.

    Returns:
        All tensors, and how many hidden units are left by the name of the first layer.
    """
    state, widths = dict(state), {}
    for layer in find_in_state(state) if layers is None else layers:
        names = [f'{name}.{kind}' for name in (layer.first, layer.second) for kind in _KINDS]
        keep, *tensors = compact_pair(*map(state.get, names), layer.activation)
        state |= {name: t for name, t in zip(names, tensors, strict=True) if t is not None}
        widths[layer.first] = int(keep.count_nonzero())
    return state, widths


_KINDS = ('weight', 'bias')


@torch.no_grad()
def compact_(model: nn.Module, pairs: Mapping[str, str] | None = None) -> dict[str, int]:
    """Takes the dead hidden units out of a model, in place. Its outputs in eval mode stay.

    Layers get new parameters: build optimizers and wrappers afterwards.

    Args:
        model: A backbone, a segmentor, a detector, or any other model.
        pairs: See `mmslak.sparsity.find_hidden_layers`.

    Returns:
        How many hidden units are left by the name of the first layer.

    Raises:
        ValueError: See `mmslak.sparsity.find_hidden_layers`.
    """
    layers = find_hidden_layers(model, pairs)
    state, widths = compact_state(dict(model.named_parameters()), layers)
    _put(model, layers, state)
    return widths


@torch.no_grad()
def narrow_(model: nn.Module, hidden_channels: Sequence[int]) -> None:
    """Cuts the hidden layers of a model to their first units, so that a compact file fits.

    Args:
        model: Any model whose hidden layers are found by themselves.
        hidden_channels: Hidden units of each layer, in the order of
            `mmslak.sparsity.find_hidden_layers`.

    Raises:
        ValueError: If the model has another number of hidden layers, or one has fewer units.
    """
    layers = find_hidden_layers(model)
    own = dict(model.named_parameters())
    most = [len(own[f'{layer.first}.weight']) for layer in layers]
    if len(hidden_channels) != len(most) or not all(
        1 <= units <= limit for units, limit in zip(hidden_channels, most, strict=True)
    ):
        raise ValueError(
            f'hidden_channels: expected {len(most)} numbers from 1 to at most {most}, '
            f'got {list(hidden_channels)}'
        )
    state = {}
    for layer, units in zip(layers, hidden_channels, strict=True):
        state |= {name: own[name].narrow(dim, 0, units).clone() for name, dim in layer.entries}
    _put(model, layers, state)


def _put(model: nn.Module, layers: Iterable[HiddenLayer], state: Mapping[str, Tensor]) -> None:
    """Gives the layers their tensors of the state, and the numbers of channels of these."""
    for layer in layers:
        for name in (layer.first, layer.second):
            module = model.get_submodule(name)
            for kind in _KINDS:
                own, new = getattr(module, kind), state.get(f'{name}.{kind}')
                if new is not None and new is not own:
                    setattr(module, kind, nn.Parameter(new, requires_grad=own.requires_grad))
            what = 'channels' if isinstance(module, nn.Conv2d) else 'features'
            for side, channels in zip(('out', 'in'), module.weight.shape[:2], strict=True):
                setattr(module, f'{side}_{what}', channels)
