"""Norms of feature maps, and the folding of a batch norm into the convolution before it."""

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def build_norm(norm_cfg: dict | None, channels: int) -> nn.Module:
    """Builds a norm of (N, C, H, W).

    Args:
        norm_cfg: Its config; None builds a batch norm.
        channels: C.

    Raises:
        ValueError: If it is a norm of another layout, which would only fail in `forward`.
    """
    norm_cfg = norm_cfg or dict(type='BN')
    norm = build_norm_layer(norm_cfg, channels)[1]
    # Exactly: LN2d, which does take feature maps, is a LayerNorm too.
    if type(norm) in (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm3d):
        raise ValueError(
            f'norm_cfg: expected a norm of (N, C, H, W), such as BN, SyncBN or GN, '
            f'got {norm_cfg["type"]!r}'
        )
    return norm


def is_fixed(norm: nn.Module) -> bool:
    """Whether a norm is a batch norm that uses its running statistics: a scale and a shift."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def fold_sources(kernel: Tensor, norm: nn.Module) -> list[Tensor | float | None]:
    """All that `fold` reads."""
    return [kernel, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps]


def fold(kernel: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Folds a batch norm into the convolution before it.

    The result does in one convolution what the two do in eval mode. It has at least float32;
    float64, which Apple's GPUs lack, would not change outputs in float32.

    Args:
        kernel: Weight (C_out, C_in, kH, kW) of the convolution, which has no bias.
        norm: The batch norm after it.

    Returns:
        Kernel of that shape and bias (C_out,).

    Raises:
        TypeError: If the norm is not a batch norm with running statistics. No other norm is fixed
            in eval mode.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        raise TypeError(
            f'only batch norm can be fused into a kernel, one with running statistics, got {norm}'
        )
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    mean, scale = norm.running_mean.to(dtype), torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    bias = -mean * scale
    if norm.bias is not None:
        bias = bias + norm.bias.to(dtype)
    return kernel.to(dtype) * scale.view(-1, 1, 1, 1), bias
