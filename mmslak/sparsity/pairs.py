"""Hidden units: pairs of layers, of which one makes the units and the other one reads them."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Activation = Callable[[Tensor], Tensor]

# Names of the two layers in known networks, and of what stands beside them, not between them.
FAMILIES = (
    # SLaK, PeLK and the authors' ConvNeXt
    (r'((?:.*\.)?)pwconv1', r'\1pwconv2', r'(large_kernel|dwconv|norm|gamma)\b'),
    # ConvNeXt of mmpretrain
    (r'((?:.*\.)?)pointwise_conv1', r'\1pointwise_conv2', r'(depthwise_conv|norm|gamma)\b'),
    # FFN of mmcv: Swin, ViT, DETR
    (r'((?:.*\.)?layers\.)0\.0', r'\g<1>1', r'$^'),
    # Mlp of timm
    (r'((?:.*\.)?)fc1', r'\1fc2', r'$^'),
)
# Activations of torch.nn that are no function of one element, or have weights.
NOT_ELEMENTWISE = (
    *(nn.GLU, nn.MultiheadAttention, nn.PReLU),
    *(nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax),
)
# What passes all units in eval mode.
NOTHING = (nn.Identity, nn.modules.dropout._DropoutNd)
READ_ELSEWHERE = 'the units are read elsewhere too, by a residual for example'


@dataclass(frozen=True)
class HiddenLayer:
    """The hidden units between two layers of a model.

    Attributes:
        first: Name of the layer that makes the units, nn.Linear or a 1×1 nn.Conv2d.
        second: Name of the layer that reads them.
        activation: The elementwise function between them; None if it is not known.
        bias: Whether `first` has a bias.
    """

    first: str
    second: str
    activation: Activation | None = None
    bias: bool = True

    @property
    def entries(self) -> tuple[tuple[str, int], ...]:
        """(name of a parameter, dimension of the units in it), for all that belongs to a unit."""
        bias = ((f'{self.first}.bias', 0),) if self.bias else ()
        return ((f'{self.first}.weight', 0), *bias, (f'{self.second}.weight', 1))


def find_hidden_layers(
    model: nn.Module, pairs: Mapping[str, str] | None = None
) -> list[HiddenLayer]:
    """Finds the hidden layers of a model, in the order of its modules.

    Args:
        model: Any model. SLaK, PeLK, ConvNeXt (timm's and mmpretrain's names), and the FFN of mmcv
            and the Mlp of timm (Swin, ViT) are found by themselves; such a pair that is none, with
            a norm between its layers for example, is left out with a warning.
        pairs: Regular expressions of the names of the first layers, and what to make of them for
            the second ones (see `re.Match.expand`), such as `{r'(.*)\\.fc_in': r'\\1.fc_out'}`. The
            layers of a pair have to meet in an elementwise function, which `probe` can check.

    Raises:
        ValueError: If there is none, or one of `pairs` cannot be: a layer is neither nn.Linear nor
            a 1×1 convolution in one group, the sizes do not agree, a weight is shared or computed,
            or a norm, a scale or a depthwise convolution of the units is beside them. The message
            names the layers and the reason.
    """
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found, faults = [], []
    families = FAMILIES if pairs is None else [(*pair, r'$^') for pair in pairs.items()]
    try:
        candidates = list(_candidates(modules, families))
    except re.error as error:
        raise ValueError(f'pairs: {error} in the regular expressions {pairs}') from error
    for pattern in pairs or ():
        if not any(re.fullmatch(pattern, name) for name in modules):
            raise ValueError(f'pairs: no layer of {type(model).__name__} is called {pattern!r}')
    for first, second, outside in candidates:
        if pairs is None and second not in modules:
            continue
        fault = _fault(modules, uses, first, second, outside)
        if any(layer.second == second for layer in found):
            fault = f'{second} belongs to another pair'
        if fault is not None:
            faults.append(f'{first} and {second}: {fault}')
            continue
        bias = modules[first].bias is not None
        found.append(HiddenLayer(first, second, _activation(modules, first, second), bias))
    if faults and (pairs is not None or not found):
        raise ValueError(f'no hidden units between {faults[0]}')
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no hidden units that are found by name; name the layers, '
            r"for example pairs={r'(.*)\.fc_in': r'\1.fc_out'}"
        )
    if faults:
        more = f' ({len(faults)} such pairs are left out)' if len(faults) > 1 else ''
        warnings.warn(f'no hidden units between {faults[0]}{more}', stacklevel=2)
    return found


def find_in_state(state: Mapping[str, Tensor], prefix: str = '') -> list[HiddenLayer]:
    """Finds the hidden layers of a state dict by the names that `find_hidden_layers` knows.

    The activation of SLaK and PeLK is GELU; that of others is not known from a file.

    Args:
        state: Tensors by name.
        prefix: Prefix of the names to look at.
    """
    weights = dict.fromkeys(n.removesuffix('.weight') for n in state if n.endswith('.weight'))
    found = []
    for first, second, outside in _candidates(weights, FAMILIES):
        if not first.startswith(prefix) or second not in weights:
            continue
        one, other = state[f'{first}.weight'], state[f'{second}.weight']
        parent = _parent(first, second)
        others = [
            name
            for name, tensor in state.items()
            if name.startswith(parent)
            and not name.startswith((f'{first}.', f'{second}.'))
            and not re.match(outside, name.removeprefix(parent))
            and len(one) in tensor.shape
        ]
        if others or not _is_pair(one, other):
            continue
        ours = any(name.startswith(f'{parent}large_kernel.') for name in state)
        found.append(HiddenLayer(first, second, F.gelu if ours else None, f'{first}.bias' in state))
    return found


def _is_pair(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are those of layers without extent, with units between them."""
    return all(w.dim() >= 2 and w[0, 0].numel() == 1 for w in (first, second)) and (
        len(first) == second.shape[1]
    )


def _candidates(
    names: Mapping[str, object], families: Sequence[tuple[str, str, str]]
) -> Iterator[tuple[str, str, str]]:
    """(first, second, pattern of what is beside them) for all names that a family matches."""
    for name in names:
        for pattern, second, outside in families:
            match = re.fullmatch(pattern, name)
            if match:
                yield name, match.expand(second), outside
                break


def _parent(first: str, second: str) -> str:
    """What the names begin with, up to the dot behind their nearest common parent."""
    shared = []
    for one, other in zip(first.split('.')[:-1], second.split('.')[:-1], strict=False):
        if one != other:
            break
        shared.append(one)
    return ''.join(f'{part}.' for part in shared)


def _fault(
    modules: dict[str, nn.Module], uses: dict[int, int], first: str, second: str, outside: str
) -> str | None:
    """Why two layers are no pair; None if they are one."""
    for name in (first, second):
        layer = modules.get(name)
        if layer is None:
            return f'there is no layer {name}'
        if not _is_pointwise(layer):
            kind = f'{type(layer).__name__}({layer.extra_repr()})'
            return f'{name} is neither nn.Linear nor a 1×1 nn.Conv2d of one group, but {kind}'
        own = dict(layer.named_parameters())
        if 'weight' not in own or not set(own) <= {'weight', 'bias'}:
            return f'{name} computes its weight (pruning or a parametrization): remove that first'
        if any(uses[id(parameter)] > 1 for parameter in own.values()):
            return f'{name} shares its weight with another layer'
    hidden, inputs = len(modules[first].weight), modules[second].weight.shape[1]
    if hidden != inputs:
        return f'{first} has {hidden} outputs, {second} has {inputs} inputs'
    parent = _parent(first, second)
    for name, module in modules.items():
        if not f'{name}.'.startswith(parent) or name in (first, second) or _is_pointwise(module):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for tensor_name, tensor in tensors:
            full = f'{name}.{tensor_name}' if name else tensor_name
            if re.match(outside, full.removeprefix(parent)) is None and hidden in tensor.shape:
                return f'{full} has one value for each of the {hidden} units: does it act on them?'
    return None


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer mixes channels and nothing else."""
    if isinstance(layer, nn.Conv2d):
        return (layer.kernel_size, layer.groups) == ((1, 1), 1) and layer.padding in ((0, 0), 0)
    return isinstance(layer, nn.Linear)


def _activation(modules: dict[str, nn.Module], first: str, second: str) -> Activation | None:
    """The function between two layers.

    In nn.Sequential it is what stands between them, elsewhere the only activation among the
    children of their nearest common parent.
    """
    parent = _parent(first, second)
    owner = modules[parent.removesuffix('.')]
    if isinstance(owner, nn.Sequential):
        inside = dict(owner.named_modules(remove_duplicate=False))
        names = list(inside)
        start, end = (names.index(name.removeprefix(parent)) for name in (first, second))
        between = [inside[name] for name in names[start + 1 : end]]
        found = [m for m in between if not isinstance(m, NOTHING) and not any(m.children())]
    else:
        found = [child for child in owner.children() if _is_elementwise(child)]
    return found[0] if len(found) == 1 and _is_elementwise(found[0]) else None


def _is_elementwise(module: nn.Module) -> bool:
    return type(module).__module__ == 'torch.nn.modules.activation' and not isinstance(
        module, NOT_ELEMENTWISE
    )


def probe(model: nn.Module, layers: Sequence[HiddenLayer], run: Callable[[], object]) -> None:
    """Checks that every hidden unit goes through its activation to `second` alone.

    By numbers: it runs the model twice in eval mode, and perturbs every other unit the second time.
    The units between have to be equal to the bit at `second`, and so has the output once `second`
    gets its first input again. By autograd's graph, in a third run: the units of a layer reach
    neither the output nor another layer's `second` unless they have passed their own. Numbers alone
    would miss this where an activation that is off on this input hides it, the graph alone where
    something is detached.

    Args:
        model: The model.
        layers: Of `find_hidden_layers`.
        run: Runs the model on the same input each time, and returns tensors or a nest of them.

    Raises:
        ValueError: If they do not; the message names the layer and the reason.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        fault = _fault_by_numbers(model, layers, run)
        if fault is not None:
            if _fault_by_numbers(model, [], run) is not None:
                raise ValueError('run() does not give the same output twice')
            # Of several layers, one can disturb the others.
            alone = (_fault_by_numbers(model, [layer], run) for layer in layers)
            fault = next((one for one in alone if one is not None), fault)
        else:
            fault = _fault_by_graph(model, layers, run)
        if fault is not None:
            raise ValueError(f'no hidden units between {fault}')
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.enable_grad()
def _fault_by_graph(
    model: nn.Module, layers: Sequence[HiddenLayer], run: Callable[[], object]
) -> str | None:
    """The first layer whose units something reads before `second`; None if there is none."""
    marks: list[list[Tensor]] = [[] for _ in layers]  # leaves of the graph, one for each call
    read: set[int] = set()  # marks that something has read

    def at_first(own: list[Tensor], module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        own.append(output.new_zeros((), requires_grad=True))
        return output + own[-1]

    def at_second(
        own: list[Tensor], calls: Iterator[int], module: nn.Module, inputs: tuple
    ) -> tuple:
        read.update(_leaves(inputs[:1]) - {id(own[next(calls)])})
        return (inputs[0].detach(),)

    handles = []
    for layer, own in zip(layers, marks, strict=True):
        first, second = model.get_submodule(layer.first), model.get_submodule(layer.second)
        handles += [
            first.register_forward_hook(partial(at_first, own)),
            second.register_forward_pre_hook(partial(at_second, own, count())),
        ]
    try:
        read |= _leaves(_tensors(run()))
    finally:
        for handle in handles:
            handle.remove()
    for layer, own in zip(layers, marks, strict=True):
        if any(id(mark) in read for mark in own):
            return f'{layer.first} and {layer.second}: {READ_ELSEWHERE}'
    return None


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The leaves of autograd's graph that tensors depend on, by id()."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == 'AccumulateGrad':
            found.add(id(node.variable))
        before = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= before
        nodes += before
    return found


@torch.no_grad()
def _fault_by_numbers(
    model: nn.Module, layers: Sequence[HiddenLayer], run: Callable[[], object]
) -> str | None:
    """The first thing that is wrong, None if nothing is."""
    probes = [_Probe(model, layer) for layer in layers]
    try:
        expected = _tensors(run())
        for one in probes:
            one.perturbing = True
        found = _tensors(run())
    finally:
        for one in probes:
            one.remove()
    for one in probes:
        if one.fault() is not None:
            return f'{one.layer.first} and {one.layer.second}: {one.fault()}'
    if len(found) == len(expected) and all(map(torch.equal, found, expected)):
        return None
    names = ', '.join(f'{layer.first} and {layer.second}' for layer in layers)
    return f'{names}: {READ_ELSEWHERE}'


def _tensors(output: object) -> list[Tensor]:
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError('run: expected a function that returns tensors')
    return tensors


class _Probe:
    """Hooks on both layers of a pair: they record in the first run, and perturb in the second."""

    def __init__(self, model: nn.Module, layer: HiddenLayer) -> None:
        first, second = model.get_submodule(layer.first), model.get_submodule(layer.second)
        self.layer, self.perturbing = layer, False
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.calls = 0
        self.faults: list[str] = []
        self.handles = [
            first.register_forward_hook(self._at_first),
            second.register_forward_pre_hook(self._at_second),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def fault(self) -> str | None:
        if not self.inputs or len(self.outputs) != len(self.inputs):
            return 'run() does not call the second layer after the first one'
        return self.faults[0] if self.faults else None

    def _at_first(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        units = _units(module)
        if not self.perturbing:
            self.outputs.append(output.transpose(units, -1).clone())
            return None
        output = output.transpose(units, -1).clone()
        output[..., ::2] += 1 + output.abs().max()
        return output.transpose(units, -1)

    def _at_second(self, module: nn.Module, inputs: tuple) -> tuple | None:
        got = inputs[0].transpose(_units(module), -1)
        if not self.perturbing:
            self.inputs.append(got.clone())
            self._compare(got)
            return None
        before = self.inputs[min(self.calls, len(self.inputs) - 1)]
        self.calls += 1
        same = got == before
        if not same[..., 1::2].all():
            self.faults.append('the units are mixed between them, by a norm for example')
        elif same[..., ::2].all():
            self.faults.append('the units do not reach the second layer')
        return (before.transpose(_units(module), -1),)

    def _compare(self, got: Tensor) -> None:
        """Compares the activation that is said to stand between with what comes out there."""
        activation = self.layer.activation
        if activation is None or len(self.outputs) != len(self.inputs):
            return
        expected = activation(self.outputs[-1].clone())
        if expected.shape == got.shape and not torch.allclose(expected, got, 1e-3, 1e-4):
            self.faults.append(f'what stands between them is not {activation}')


def _units(layer: nn.Module) -> int:
    """The dimension of the units in what goes in and out of a layer."""
    return 1 if isinstance(layer, nn.Conv2d) else -1
