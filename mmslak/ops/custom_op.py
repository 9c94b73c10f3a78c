"""The depthwise operator as torch sees it: forward and backward, with fake kernels and autograd.

Registered as a custom operator, it is one opaque node for torch.compile and runs on FakeTensors.
torch 2.1 has no `torch.library.custom_op`. There the same two functions make an autograd.Function,
and a compiled graph breaks at it.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from mmslak.ops import fft, native, rows, toeplitz, triton_backend
from mmslak.ops.choice import choose
from mmslak.ops.native import layout_of

METHODS: dict[str, ModuleType] = {
    'native': native,
    'fft': fft,
    'toeplitz': toeplitz,
    'triton': triton_backend,
    'rows': rows,  # of 'auto' alone
}


def convolve_branches(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, backend: str, summed: bool
) -> list[Tensor]:
    """Differentiable outputs of x's shape: one per kernel set, or a list of their sum plus bias.

    Args:
        x: (N, C, H, W).
        weights: Kernels (C, 1, kH, kW), odd sides.
        bias: Shape (C,) or None; only where summed.
        backend: One of `mmslak.ops.BACKENDS`.
        summed: Whether the outputs are added up.
    """
    if hasattr(torch.library, 'custom_op'):
        return torch.ops.mmslak.depthwise_branches(x, weights, bias, backend, summed)
    return list(_Function.apply(x, bias, backend, summed, *weights))


def _forward(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, backend: str, summed: bool
) -> list[Tensor]:
    method = METHODS[choose(backend, x, weights, summed).forward]
    with _without_autocast(x):
        outputs = method.forward(x, weights, bias, summed)
    return [_in_layout_of(x, output) for output in outputs]


def _backward(
    x: Tensor,
    weights: list[Tensor],
    gradients: list[Tensor],
    backend: str,
    input_gradient: bool,
    weight_gradients: bool,
) -> list[Tensor]:
    """Gradient of x if wanted, followed by those of the kernels if wanted."""
    methods = choose(backend, x, weights, len(gradients) < len(weights))
    both = methods.input_gradient == methods.weight_gradient
    dx = dws = None
    with _without_autocast(x):
        if input_gradient:
            method = METHODS[methods.input_gradient]
            dx, dws = method.backward(x, weights, gradients, True, both and weight_gradients)
            dx = _in_layout_of(x, dx)
        if weight_gradients and dws is None:
            method = METHODS[methods.weight_gradient]
            _, dws = method.backward(x, weights, gradients, False, True)
    dws = [dw.contiguous() for dw in dws] if dws is not None else []
    return ([dx] if input_gradient else []) + dws


def has_autocast(device: str) -> bool:
    """Whether a type of device has autocast; torch 2.1, which cannot tell, has it on two."""
    known = getattr(torch.amp, 'is_autocast_available', lambda device: device in ('cpu', 'cuda'))
    return known(device)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Switches autocast off where the device has it: the inputs are cast already."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def _in_layout_of(x: Tensor, output: Tensor) -> Tensor:
    return output.contiguous(memory_format=layout_of(x))


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


def _bias_gradient(gradients: list[Tensor]) -> Tensor:
    return gradients[0].sum((0, 2, 3))


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
        return dx, dws, _bias_gradient(gradients) if need_bias else None, None, None

    depthwise_branches.register_autograd(_autograd, setup_context=_setup_context)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, backend, summed, *weights) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.backend = backend
        return tuple(_forward(x, list(weights), bias, backend, summed))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, need_bias, _, _, *need_weights = ctx.needs_input_grad
        results = _backward(x, weights, list(gradients), ctx.backend, need_x, any(need_weights))
        dx = results.pop(0) if need_x else None
        dbias = _bias_gradient(gradients) if need_bias else None
        return dx, dbias, None, None, *(results or [None] * len(weights))
