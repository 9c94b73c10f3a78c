"""PyTorch's own depthwise convolution, in the layout in which it is fast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    if not summed:
        return [_convolve(x, weight) for weight in weights]
    first, *others = merged(weights)
    total = _convolve(x, first, bias)
    for weight in others:
        total = total + _convolve(x, weight)
    return [total]


def exported(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """The same as `forward`, as one plain convolution per kernel and nothing around it."""
    outputs = []
    for i, weight in enumerate(weights):
        own_bias = bias if i == 0 else None
        channels = weight.shape[0]
        outputs.append(F.conv2d(x, weight, own_bias, padding=_padding(weight), groups=channels))
    return [sum(outputs[1:], outputs[0])] if summed else outputs


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels; `gradients` holds one per kernel or one for their sum."""
    if len(gradients) < len(weights):
        gradients = list(gradients) * len(weights)
    dx, dws = None, []
    for weight, gradient in zip(weights, gradients, strict=True):
        arguments = [None, (1, 1), _padding(weight), (1, 1), False, (0, 0), len(weight)]
        mask = [input_gradient, weight_gradients, False]
        term, dw, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *arguments, mask)
        dws.append(dw)
        if input_gradient:
            dx = term if dx is None else dx.add_(term)
    return dx, dws if weight_gradients else None


def merged(weights: Sequence[Tensor]) -> list[Tensor]:
    """Fewer kernels of the same sum: what fits into another is added to its centre."""
    large: list[Tensor] = []
    for weight in sorted(weights, key=lambda w: -w.shape[2] * w.shape[3]):
        for i, other in enumerate(large):
            rows, columns = (other.shape[d] - weight.shape[d] for d in (2, 3))
            if rows >= 0 and columns >= 0:
                sides = (columns // 2, columns // 2, rows // 2, rows // 2)
                large[i] = other + F.pad(weight, sides)
                break
        else:
            large.append(weight)
    return large


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _better_upright(x, weight):
        padding = _padding(weight)[::-1]
        upright = F.conv2d(_turned(x), _turned(weight), bias, padding=padding, groups=len(weight))
        return _turned(upright)
    return F.conv2d(x, weight, bias, padding=_padding(weight), groups=len(weight))


def _better_upright(x: Tensor, weight: Tensor) -> bool:
    """oneDNN takes 30 times longer for a wide strip in NCHW than for the same strip upright."""
    return x.device.type == 'cpu' and weight.shape[3] > 2 * weight.shape[2] and x.is_contiguous()


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous()


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2
