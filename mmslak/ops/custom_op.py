"""The operator as torch's graphs see it: one opaque node with fake kernels and autograd.

Where torch.compile traces, torch's own convolutions take its place if they are what was chosen.
torch before 2.4 has no `torch.library.custom_op`; a compiled graph breaks at the operator there.
"""

import functools
import operator

import torch
from torch import Tensor

from mmslak.ops.choice import choose, state
from mmslak.ops.function import (
    DepthwiseFunction,
    bias_gradient,
    learns,
    transforms_run,
    wanted_gradients,
    without_autocast,
)
from mmslak.ops.layouts import NHWC, layout_of
from mmslak.ops.methods import compute_backward, compute_forward
from mmslak.ops.native import (
    WAYS,
    WIDE,
    convolve,
    crop_to_map,
    plain,
    plain_branches,
    usual_way,
)
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
        plan: The methods, where they are known; None lets the operator choose when it runs.
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
    """torch's own convolutions where they win; else the node that chooses again as it runs."""
    if transforms_run():
        return plain_branches(x, weights, bias, summed)
    sizes = (*x.shape, *x.stride(), *(size for weight in weights for size in weight.shape))
    if any(isinstance(size, torch.SymInt) for size in sizes):  # a graph for any size
        return convolve_branches(x, weights, bias, backend, summed)
    plan = choose(backend, x, weights, summed, *wanted_gradients(x, weights))
    wants_gradients = learns(x, weights, bias)
    # Inductor would take the map to NHWC, where oneDNN does not come back.
    never_ends = Case.of(x, weights, summed).never_ends
    if wants_gradients and plan.plain and not never_ends:
        return plain_branches(x, weights, bias, summed)
    # A method for each of the kernels, and of 'native' the one that it is for this kernel.
    names = plan.forward * (len(weights) if len(plan.forward) == 1 else 1)
    ways = [
        usual_way(x, weight) if name == 'native' else name
        for name, weight in zip(names, weights, strict=True)
    ]
    if wants_gradients or not set(ways) <= set(WAYS):
        return convolve_branches(x, weights, bias, backend, summed)
    outputs = []
    for weight, way in zip(weights, ways, strict=True):
        if not plan.plain:
            weight = crop_to_map(weight, x.shape)
        offset = bias if summed and not outputs else None
        outputs.append(_traced(x, weight, offset, way, never_ends))
    return [functools.reduce(operator.add, outputs)] if summed else outputs


def _traced(x: Tensor, weight: Tensor, bias: Tensor | None, way: str, never_ends: bool) -> Tensor:
    """One convolution, in a way of `native.forward`, as it is in a graph.

    Inductor computes all convolutions of a CPU in NHWC, and fuses the copies that this takes. Where
    it would not do so, the convolution is a node of ours, which takes 0.1 ms more.
    """
    on_cpu, in_nhwc = x.device.type == 'cpu', layout_of(x) == NHWC
    if on_cpu and not in_nhwc and not never_ends and way == 'turned':
        way = 'other'
    # Of a single image, Inductor may lose the stride of the batch. torch then takes the map for
    # NCHW, which oneDNN is slow in where kernels are wide.
    columns = weight.shape[2 if way == 'turned' else 3]
    loses_layout = in_nhwc and (way == 'other' or (len(x) == 1 and columns > WIDE))
    own = on_cpu and (never_ends or loses_layout)
    return convolve(x, weight, bias, way, torch.ops.mmslak.convolution if own else plain)


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
    # Unlike torch's own in a graph, with the strides that x was traced with.
    _library.define(
        'convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
        tags=(getattr(torch.Tag, 'needs_exact_strides', torch.Tag.needs_fixed_stride_order),),
    )
    _library.impl('convolution', plain, 'CompositeExplicitAutograd')

    @torch.library.register_fake('mmslak::convolution', lib=_library)
    def _(x, weight, bias):
        return _empty_like(x)
