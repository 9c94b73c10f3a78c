"""The operator as torch's graphs see it: one opaque node with fake kernels and autograd.

Where torch.compile traces, torch's own convolutions take its place if they are what was chosen.
torch 2.1 has no `torch.library.custom_op`; a compiled graph breaks at the operator there.
"""

import torch
from torch import Tensor

from mmslak.ops.choice import choose, state
from mmslak.ops.function import (
    DepthwiseFunction,
    bias_gradient,
    wanted_gradients,
    without_autocast,
)
from mmslak.ops.layouts import NCHW, layout_of
from mmslak.ops.methods import compute_backward, compute_forward
from mmslak.ops.native import WAYS, plain_branches, usual_way
from mmslak.ops.plans import Case, Plan


def convolve_branches(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    backend: str,
    summed: bool,
    plan: Plan | None = None,
) -> list[Tensor]:
    """Differentiable outputs of x's shape: one per kernel set, or a list of their sum plus bias.

    Args:
        x: (N, C, H, W).
        weights: Kernels (C, 1, kH, kW), odd sides.
        bias: Shape (C,) or None; only where summed.
        backend: One of `mmslak.ops.BACKENDS`.
        summed: Whether the outputs are added up.
        plan: The methods, where they are known; None lets the operator choose when it runs, as it
            has to in a graph.
    """
    if plan is None and hasattr(torch.library, 'custom_op'):
        return torch.ops.mmslak.depthwise_branches(x, weights, bias, backend, summed)
    if plan is None:
        plan = choose(backend, x, weights, summed, True, True)
    return list(DepthwiseFunction.apply(x, bias, plan, summed, *weights))


def convolve_in_graph(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, backend: str, summed: bool
) -> list[Tensor]:
    """As `convolve_branches`, for torch.compile: the choice is made while it traces."""
    if not hasattr(torch.library, 'custom_op'):
        return convolve_branches(x, weights, bias, backend, summed)
    # The graph is made anew, and taken from no cache on disk, where other choices may hold.
    return torch.ops.mmslak.depthwise_chosen(x, weights, bias, backend, summed, state())


def _chosen(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    backend: str,
    summed: bool,
    state: str,
) -> list[Tensor]:
    """torch's own convolutions, which the compiler fuses, where they win; else the opaque node."""
    if any(isinstance(size, torch.SymInt) for size in (*x.shape, *x.stride())):
        return convolve_branches(x, weights, bias, backend, summed)  # chooses when it runs
    if Case.of(x, weights, summed).never_ends:  # in NHWC, to which Inductor takes it
        return convolve_branches(x, weights, bias, backend, summed)
    wanted = wanted_gradients(x, weights)
    plan = choose(backend, x, weights, summed, *wanted)
    if plan.plain:
        return plain_branches(x, weights, bias, summed)
    ways = None if any(wanted) else _ways_in_graph(plan.forward, x, weights)
    if ways is not None:
        return compute_forward(ways, x, weights, bias, summed)
    return convolve_branches(x, weights, bias, backend, summed)


def _ways_in_graph(
    names: tuple[str, ...], x: Tensor, weights: list[Tensor]
) -> tuple[str, ...] | None:
    """How torch's convolution is called for each of the kernels; None if the node is better.

    Inductor computes all convolutions of a CPU in NHWC. For maps in NCHW, that is the other layout
    anyway, which a second exchange makes slower; of maps in NHWC, it would undo the copy.
    """
    if len(names) < len(weights):
        names = names * len(weights)
    ways = tuple(
        usual_way(x, weight) if name == 'native' else name
        for name, weight in zip(names, weights, strict=True)
    )
    if not set(ways) <= set(WAYS):
        return None
    if x.device.type == 'cpu' and layout_of(x) == NCHW:
        return tuple('conv' if way == 'conv' else 'other' for way in ways)
    return None if 'other' in ways else ways


def _forward(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, backend: str, summed: bool
) -> list[Tensor]:
    plan = choose(backend, x, weights, summed)
    with without_autocast(x):
        return compute_forward(plan.forward, x, weights, bias, summed)


def _backward(
    x: Tensor,
    weights: list[Tensor],
    gradients: list[Tensor],
    backend: str,
    input_gradient: bool,
    weight_gradients: bool,
) -> list[Tensor]:
    """Gradient of x if wanted, followed by those of the kernels if wanted."""
    summed = len(gradients) < len(weights)
    plan = choose(backend, x, weights, summed, input_gradient, weight_gradients)
    with without_autocast(x):
        dx, dws = compute_backward(plan, x, weights, gradients, input_gradient, weight_gradients)
    return ([] if dx is None else [dx]) + (dws or [])


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


if hasattr(torch.library, 'custom_op'):
    depthwise_branches = torch.library.custom_op(
        'mmslak::depthwise_branches', _forward, mutates_args=()
    )
    depthwise_branches_backward = torch.library.custom_op(
        'mmslak::depthwise_branches_backward', _backward, mutates_args=()
    )

    @depthwise_branches.register_fake
    def _(x, weights, bias, backend, summed):
        return [_empty_like(x) for _ in range(1 if summed else len(weights))]

    @depthwise_branches_backward.register_fake
    def _(x, weights, gradients, backend, input_gradient, weight_gradients):
        dws = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
        return ([_empty_like(x)] if input_gradient else []) + (dws if weight_gradients else [])

    def _setup_context(ctx, inputs, output) -> None:
        x, weights, _, ctx.backend, _ = inputs
        ctx.save_for_backward(x, *weights)

    def _autograd(ctx, gradients: list[Tensor]):
        x, *weights = ctx.saved_tensors
        need_x, need_weights, need_bias, _, _ = ctx.needs_input_grad
        need_weights = any(need_weights)
        dx = dws = None
        if need_x or need_weights:
            results = torch.ops.mmslak.depthwise_branches_backward(
                x, weights, gradients, ctx.backend, need_x, need_weights
            )
            dx = results.pop(0) if need_x else None
            dws = results or [None] * len(weights)
        return dx, dws, bias_gradient(gradients) if need_bias else None, None, None

    depthwise_branches.register_autograd(_autograd, setup_context=_setup_context)

    _library = torch.library.Library('mmslak', 'FRAGMENT')
    _library.define(
        'depthwise_chosen(Tensor x, Tensor[] weights, Tensor? bias, str backend, bool summed, '
        'str state) -> Tensor[]'
    )
    _library.impl('depthwise_chosen', _chosen, 'CompositeImplicitAutograd')
