"""PyTorch's own depthwise convolution, in the layout in which it is fast."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C, H, W) convolved with kernels (C, 1, kH, kW): 'same' output of x's shape."""
    if _better_upright(x, weight):
        upright = F.conv2d(
            _turned(x), _turned(weight), padding=_padding(weight)[::-1], groups=len(weight)
        )
        return _turned(upright)
    return F.conv2d(x, weight, padding=_padding(weight), groups=len(weight))


def input_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of x."""
    return _backward(x, weight, gradient, 0)


def weight_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the kernels."""
    return _backward(x, weight, gradient, 1)


def _backward(x: Tensor, weight: Tensor, gradient: Tensor, which: int) -> Tensor:
    arguments = [None, (1, 1), _padding(weight), (1, 1), False, (0, 0), len(weight)]
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(gradient, x, weight, *arguments, mask)[which]


def _better_upright(x: Tensor, weight: Tensor) -> bool:
    """oneDNN takes 30 times longer for a wide strip in NCHW than for the same strip upright."""
    return x.device.type == 'cpu' and weight.shape[3] > 2 * weight.shape[2] and x.is_contiguous()


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous()


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2
