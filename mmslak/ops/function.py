"""The operator for autograd in eager mode."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmslak.ops.methods import compute_backward, compute_forward
from mmslak.ops.plans import Plan


class DepthwiseFunction(torch.autograd.Function):
    """One output per kernel, or the sum of all plus bias, by the methods of a plan.

    The arguments are x (N, C, H, W), bias (C,) or None, the plan, whether the outputs are summed,
    and the kernels, each (C, 1, kH, kW).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, bias: Tensor | None, plan: Plan, summed: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.plan = plan
        with without_autocast(x):
            return tuple(compute_forward(plan.forward, x, weights, bias, summed))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, need_bias, _, _, *need_weights = ctx.needs_input_grad
        with without_autocast(x):
            dx, dws = compute_backward(ctx.plan, x, weights, gradients, need_x, any(need_weights))
        dbias = bias_gradient(gradients) if need_bias else None
        return dx, dbias, None, None, *(dws or [None] * len(weights))


def wanted_gradients(x: Tensor, weights: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether autograd will ask for the gradient of x, and for those of the kernels."""
    if not torch.is_grad_enabled():
        return False, False
    return x.requires_grad, any(weight.requires_grad for weight in weights)


def learns(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> bool:
    """Whether autograd will ask for any gradient."""
    return any(wanted_gradients(x, weights if bias is None else [*weights, bias]))


def transforms_run() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, also while a graph is traced.

    torch has no public function that tells.
    """
    stacked = torch._C._functorch.peek_interpreter_stack() is not None
    return stacked or torch.autograd.forward_ad._current_level >= 0


def bias_gradient(gradients: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Gradient (C,) of the bias, which is added to the only output."""
    return gradients[0].sum((0, 2, 3))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a type of device; None if it is off or unknown."""
    if hasattr(torch, 'get_autocast_dtype'):
        known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if known else None
    if device == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    if device != 'cpu':
        return None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Switches autocast off: the inputs are cast already."""
    device = x.device.type
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device, enabled=False)
