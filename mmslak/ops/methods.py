"""Every method that can compute an output or a gradient, by its name in plans."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmslak.ops import fft, native, rows, toeplitz, triton_backend
from mmslak.ops.layouts import in_layout, layout_of
from mmslak.ops.plans import Case, Plan


class Method(NamedTuple):
    """A way to compute outputs and gradients.

    Attributes:
        forward: (x, weights, bias, summed) to one output per kernel, or a list of their sum.
        backward: (x, weights, gradients, input_gradient, weight_gradients) to the gradient of x or
            None, and those of the kernels or None. None if the method computes no gradients.
        suits: Whether it may be worth trying for a case.
        shares: Whether kernels, or both gradients, cost less together than one by one.
        merges: Whether it merges the kernels of a sum itself, at less cost than before the call.
        extra_bytes: Memory that it takes for a case, beside results.
        alone: Whether it has to work in a process of its own first: what reads where it should not
            on a GPU is beyond `except`.
    """

    forward: Callable[..., list[Tensor]]
    backward: Callable[..., tuple[Tensor | None, list[Tensor] | None]] | None = None
    suits: Callable[[Case], bool] = lambda case: True
    shares: bool = False
    merges: bool = False
    extra_bytes: Callable[[Case], int] = lambda case: 0
    alone: bool = False


def _native(way: str | None, suits: Callable[[Case], bool] = lambda case: False) -> Method:
    return Method(partial(native.forward, way=way), partial(native.backward, way=way), suits)


def _ends(case: Case) -> bool:
    return case.layout == torch.contiguous_format or not case.never_ends


def _ends_in_other(case: Case) -> bool:
    return case.layout == torch.channels_last or not case.never_ends


def _is_elongated(case: Case) -> bool:
    return _ends(case) and any(rows != columns for rows, columns in case.kernels)


def _has_wide_strips(case: Case) -> bool:
    fits = case.layout == torch.contiguous_format and case.dtype != torch.float64
    return fits and any(rows <= 7 and columns > 2 * rows for rows, columns in case.kernels)


def _is_thin(case: Case) -> bool:
    return all(min(kernel) <= 7 for kernel in case.kernels)


def _triton(place: int) -> Method:
    """The Triton kernels with one of their tiles, of which small maps have fewer."""

    def tile(x: Tensor, weights: Sequence[Tensor]) -> triton_backend.Tile:
        # A plan was measured for a bucket of shapes, not all of which have as many tiles.
        several = triton_backend.tiles(x, weights)
        return several[min(place, len(several) - 1)]

    def forward(x: Tensor, weights: Sequence[Tensor], *rest: object) -> list[Tensor]:
        return triton_backend.forward(x, weights, *rest, tile=tile(x, weights))

    def backward(
        x: Tensor, weights: Sequence[Tensor], *rest: object
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        return triton_backend.backward(x, weights, *rest, tile=tile(x, weights))

    def suits(case: Case) -> bool:
        if case.device.type != 'cuda':
            return False
        x = torch.empty(case.shape, dtype=case.dtype, device='meta')
        weights = [x.new_empty((case.shape[1], 1, *kernel)) for kernel in case.kernels]
        here = torch.empty((1, 1, 1, 1), dtype=case.dtype, device=case.device)
        return triton_backend.available(here) and len(triton_backend.tiles(x, weights)) > place

    return Method(forward, backward, suits, shares=True, merges=True, alone=True)


METHODS: dict[str, Method] = {
    'fft': Method(fft.forward, fft.backward, shares=True),
    'toeplitz': Method(
        toeplitz.forward, toeplitz.backward, _is_thin, extra_bytes=toeplitz.extra_bytes
    ),
    'rows': Method(rows.forward, None, _has_wide_strips),
    'triton': _triton(0),
    'triton-2': _triton(1),
    'triton-3': _triton(2),
    'turned': _native('turned', _is_elongated),
    'other': _native('other', _ends_in_other),
    'flipped': _native('flipped', _ends),  # for the gradient of x alone
    'native': _native(None),  # the fixed rule's mixture of these
    'conv': _native('conv', _ends),  # torch's own; last, since it can be a thousand times slower
}


def merges(plan: Plan) -> bool:
    """Whether all methods of a plan merge the kernels of a sum themselves."""
    parts = [names for names in plan[:3] if names]
    return all(len(names) == 1 and METHODS[names[0]].merges for names in parts)


def compute_forward(
    names: Sequence[str],
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    summed: bool,
) -> list[Tensor]:
    """Outputs in the layout of x: one per kernel, or a list of their sum plus bias."""
    if len(names) == 1:
        outputs = METHODS[names[0]].forward(x, weights, bias, summed)
        return [_in_layout_of(x, output) for output in outputs]
    outputs = []
    for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
        offset = bias if summed and i == 0 else None
        (output,) = METHODS[name].forward(x, [weight], offset, True)
        output = _in_layout_of(x, output)
        outputs = [outputs[0].add_(output)] if summed and outputs else [*outputs, output]
    return outputs


def compute_backward(
    plan: Plan,
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool,
    weight_gradients: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The gradient of x, in its layout, if wanted, and those of the kernels if wanted.

    Args:
        plan: Which methods compute them.
        x: (N, C, H, W).
        weights: Kernels (C, 1, kH, kW).
        gradients: One of x's shape per kernel, or one for their sum.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradients: Whether those of the kernels are.
    """
    parts = [
        (plan.input_gradient, input_gradient, False),
        (plan.weight_gradient, False, weight_gradients),
    ]
    if plan.input_gradient == plan.weight_gradient:  # work on x and the gradients is shared
        parts = [(plan.input_gradient, input_gradient, weight_gradients)]
    dx = dws = None
    for names, wants_x, wants_weights in parts:
        if not wants_x and not wants_weights:
            continue
        a, b = _backward_part(names, x, weights, gradients, wants_x, wants_weights)
        dx, dws = (a if wants_x else dx), (b if wants_weights else dws)
    if dx is not None:
        dx = _in_layout_of(x, dx)
    if dws is not None:
        dws = [dw.contiguous() for dw in dws]
    return dx, dws


def _backward_part(
    names: Sequence[str],
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool,
    weight_gradients: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    if len(names) == 1:
        backward = METHODS[names[0]].backward
        return backward(x, weights, gradients, input_gradient, weight_gradients)
    if len(gradients) < len(weights):
        gradients = list(gradients) * len(weights)
    dx, dws = None, []
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        backward = METHODS[name].backward
        term, dw = backward(x, [weight], [gradient], input_gradient, weight_gradients)
        if input_gradient:
            dx = term if dx is None else dx.add_(term)
        dws += dw or []
    return dx, dws if weight_gradients else None


def _in_layout_of(x: Tensor, output: Tensor) -> Tensor:
    return in_layout(output, layout_of(x))
