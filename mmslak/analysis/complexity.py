"""Parameters and multiply-accumulates (MACs), dense and non-zero, per part of a model."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Cost:
    """What a model or a part of it costs.

    Attributes:
        parameters: Number of parameters; statistics of norms are not counted.
        nonzero_parameters: How many of them are not zero.
        macs: Multiply-accumulates of convolutions, matrix products and attention. The papers' FLOPs
            are these; torch.utils.flop_counter counts each as two operations.
        nonzero_macs: Those whose weight is not zero; products without a weight count whole.
    """

    parameters: int = 0
    nonzero_parameters: int = 0
    macs: int = 0
    nonzero_macs: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        names = [field.name for field in fields(self)]
        return Cost(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass
class Complexity:
    """Costs by part (`parts`, in the order of the model) and of all of it (`total`)."""

    parts: dict[str, Cost]
    total: Cost


def complexity(
    model: nn.Module, input_size: tuple[int, int], forward: Callable[[Tensor], object] | None = None
) -> Complexity:
    """Counts what a model costs for one picture, by running it.

    A large kernel counts by its definition, however it is computed: every weight once per output
    position, a shared one (PeLK) wherever it stands in the dense kernel. Elementwise work, norms,
    resizing and mmcv's own operators are not counted.

    Args:
        model: Takes (1, 3, H, W). Its children are the parts, a backbone's children parts of their
            own, and the members of a backbone's module lists (stages) too.
        input_size: (H, W).
        forward: What to run in place of `model(x)`.

    Returns:
        The cost of each part and of the whole.
    """
    names = _part_names(model)
    parts = {name: Cost() for name in names}
    for name, parameter in model.named_parameters():
        cost = parts[_part_of(name, names)]
        cost.parameters += parameter.numel()
        cost.nonzero_parameters += int(parameter.count_nonzero())

    device = next(model.parameters()).device
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, *input_size, generator=noise).to(device)
    was_training = model.training
    model.eval()
    counter = _Counter(model)
    try:
        with torch.no_grad(), counter.modules_followed(), counter:
            (forward or model)(x)
    finally:
        model.train(was_training)
    for module, (dense, nonzero) in counter.macs.items():
        cost = parts[_part_of(module, names)]
        cost.macs += dense
        cost.nonzero_macs += nonzero
    parts = {name: cost for name, cost in parts.items() if cost != Cost()}
    return Complexity(parts, sum(parts.values(), Cost()))


def _part_names(model: nn.Module) -> list[str]:
    """Names of the parts, in the order of the model; '' holds what belongs to no other part."""
    names = ['']
    backbone = getattr(model, 'backbone', None)
    for name, child in model.named_children():
        names.append(name)
        if child is backbone:
            names += _members(child, f'{name}.')
    return names if backbone is not None else ['', *_members(model, '')]


def _members(backbone: nn.Module, prefix: str) -> list[str]:
    names = []
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f'{prefix}{name}.{i}' for i in range(len(child))]
        else:
            names.append(f'{prefix}{name}')
    return names


def _part_of(name: str, parts: list[str]) -> str:
    """The innermost part that holds a module or parameter."""
    below = [part for part in parts if not part or name == part or name.startswith(f'{part}.')]
    return max(below, key=len)


class _Counter(TorchDispatchMode):
    """(dense, non-zero) MACs by the name of the innermost module that runs an operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.macs: dict[str, tuple[int, int]] = {}
        self.running: list[str] = ['']
        self.in_large_kernel = 0  # depth; operators in there are counted by definition

    @contextmanager
    def modules_followed(self):
        """Keeps the stack of running modules, and counts large kernels as they end."""
        handles = []
        for name, module in self.model.named_modules():
            # Modules that compute a large kernel by our operator have this attribute.
            large = hasattr(module, 'conv_backend')
            enter = partial(self._enter, name, large)
            leave = partial(self._leave, large)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, large: bool, module: nn.Module, inputs: tuple) -> None:
        self.running.append(name)
        self.in_large_kernel += large

    def _leave(self, large: bool, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.in_large_kernel -= large
        if large and not self.in_large_kernel:
            positions = output.shape[0] * math.prod(output.shape[2:])
            for kernel in _kernels(module):
                self._add(kernel.numel() * positions, int(kernel.count_nonzero()) * positions)
        self.running.pop()

    def _add(self, dense: int, nonzero: int) -> None:
        before = self.macs.get(self.running[-1], (0, 0))
        self.macs[self.running[-1]] = (before[0] + dense, before[1] + nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not self.in_large_kernel:
            dense, nonzero = self._count(func, args, output)
            if dense:
                self._add(dense, nonzero)
        return output

    def _count(self, func, args: tuple, output: object) -> tuple[int, int]:
        packet = func._overloadpacket
        if packet is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            # Every weight meets every position of the output, or of the input if transposed.
            shape = x.shape if transposed else output.shape
            positions = shape[0] * math.prod(shape[2:])
            return weight.numel() * positions, int(weight.count_nonzero()) * positions
        if packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            left, right = args[-2:] if packet in (aten.mm, aten.bmm) else args[1:3]
            dense = left.numel() * right.shape[-1]
            for factor in (left, right):
                if factor.untyped_storage().data_ptr() in self.weights:
                    # Every element of a factor is used equally often.
                    return dense, dense // factor.numel() * int(factor.count_nonzero())
            return dense, dense
        if 'scaled_dot_product' in packet.__name__:
            query, key, value = args[:3]
            per_pair = query.shape[-1] + value.shape[-1]
            dense = math.prod(query.shape[:-1]) * key.shape[-2] * per_pair
            return dense, dense
        return 0, 0


def _kernels(module: nn.Module) -> list[Tensor]:
    """The depthwise kernels (C, 1, kH, kW) of a large-kernel module, shared weights written out."""
    kernels = []
    for part in module.modules():
        if callable(getattr(part, 'kernel', None)):
            kernels.append(part.kernel())
        else:
            own = part.parameters(recurse=False)
            kernels += [p for p in own if p.dim() == 4 and p.shape[1] == 1]
    return kernels
