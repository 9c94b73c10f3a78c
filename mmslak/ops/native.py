"""PyTorch's own depthwise convolution, in the layout in which it is fast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    weights = [reached(weight, x) for weight in weights]
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
        outputs.append(_plain(x, weight, bias if i == 0 else None))
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
    # oneDNN's kernel for the gradient of the input is up to twice as slow as its forward one.
    flipped = x.device.type == 'cpu'
    mask = [input_gradient and not flipped, weight_gradients, False]
    dx, dws = None, [torch.zeros_like(weight) for weight in weights] if weight_gradients else None
    for i, gradient in enumerate(gradients):
        weight, term = reached(weights[i], x), None
        if any(mask):
            arguments = [None, (1, 1), _padding(weight), (1, 1), False, (0, 0), len(weight)]
            term, dw, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *arguments, mask)
            if weight_gradients:
                reached(dws[i], x).copy_(dw)
        if input_gradient and flipped:
            term = _convolve(gradient, weight.flip(2, 3))
        if input_gradient:
            dx = term if dx is None else dx.add_(term)
    return dx, dws


def reached(weight: Tensor, x: Tensor) -> Tensor:
    """The centre of kernels (C, 1, kH, kW), outside of which they only meet x's padding; a view."""
    for dim in (2, 3):
        beyond = max(0, weight.shape[dim] // 2 - (x.shape[dim] - 1))
        weight = weight.narrow(dim, beyond, weight.shape[dim] - 2 * beyond)
    return weight


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
    """One convolution, by way of another layout where oneDNN has no fast kernel for this one.

    Measured on AVX-512, every dtype and map alike: in NCHW kernels of more than 14 columns take 8
    to 30 times longer, in NHWC those of 11 to 14 columns up to twice as long. Either way the
    kernel lies well on its side, with H and W exchanged, if it has few rows; else the other layout
    serves it. The copies that takes are in these figures.
    """
    layout, other = torch.contiguous_format, torch.channels_last
    if x.is_contiguous(memory_format=other) and not x.is_contiguous():
        layout, other = other, layout
    rows, columns = weight.shape[2:]
    in_nchw = layout == torch.contiguous_format
    slow = columns > 14 if in_nchw else 10 < columns <= 14
    if x.device.type != 'cpu' or not slow:
        return _plain(x.contiguous(memory_format=layout), weight, bias)
    if rows <= (14 if in_nchw else 10):
        x, weight = (t.transpose(2, 3).contiguous(memory_format=layout) for t in (x, weight))
        return _plain(x, weight, bias).transpose(2, 3).contiguous(memory_format=layout)
    y = _plain(x.contiguous(memory_format=other), weight, bias)
    return y.contiguous(memory_format=layout)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=_padding(weight), groups=weight.shape[0])


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2
