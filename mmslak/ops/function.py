"""The operator for autograd in eager mode."""

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


def bias_gradient(gradients: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Gradient (C,) of the bias, which is added to the only output."""
    return gradients[0].sum((0, 2, 3))


def has_autocast(device: str) -> bool:
    """Whether a type of device has autocast; torch 2.1, which cannot tell, has it on two."""
    known = getattr(torch.amp, 'is_autocast_available', lambda device: device in ('cpu', 'cuda'))
    return known(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Switches autocast off where the device has it: the inputs are cast already."""
    device = x.device.type
    if not has_autocast(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
