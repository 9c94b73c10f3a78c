"""PyTorch's own depthwise convolution, in the layout in which it is fast."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias."""
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    if not summed:
        return [_convolve(x, weight) for weight in weights]
    first, *others = merge_kernels(weights)
    total = _convolve(x, first, bias)
    for weight in others:
        total = total + _convolve(x, weight)
    return [total]


def convolve_each(
    convolve: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    summed: bool,
) -> list[Tensor]:
    """`forward` of a method that convolves x with one kernel at a time."""
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    if not summed:
        return [convolve(x, weight) for weight in weights]
    total = sum(convolve(x, weight) for weight in merge_kernels(weights))
    return [total if bias is None else total + bias.view(-1, 1, 1)]


def exported(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """As `forward`, with one plain convolution per kernel and nothing else in the graph."""
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
        weight, term = crop_to_map(weights[i], x.shape), None
        if any(mask):
            arguments = [None, (1, 1), _padding(weight), (1, 1), False, (0, 0), len(weight)]
            term, dw, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *arguments, mask)
            if weight_gradients:
                crop_to_map(dws[i], x.shape).copy_(dw)
        if input_gradient and flipped:
            term = _convolve(gradient, weight.flip(2, 3))
        if input_gradient:
            dx = term if dx is None else dx.add_(term)
    return dx, dws


def crop_to_map(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The centre of kernels that meets pixels of a map; the entries around it only meet padding.

    Args:
        weight: Kernels (C, 1, kH, kW).
        shape: (N, C, H, W) of the map.

    Returns:
        A view (C, 1, at most 2 H - 1, at most 2 W - 1).
    """
    for dim in (2, 3):
        beyond = max(0, weight.shape[dim] // 2 - (shape[dim] - 1))
        weight = weight.narrow(dim, beyond, weight.shape[dim] - 2 * beyond)
    return weight


def merge_kernels(weights: Sequence[Tensor]) -> list[Tensor]:
    """Fewer kernels whose convolutions have the same sum.

    A kernel that fits into a larger one is added to its centre.

    Args:
        weights: Kernels (C, 1, kH, kW), odd sides.

    Returns:
        Kernels by falling area; those of equal area in the order given.
    """
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


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that outputs for x have: NHWC (channels_last) if x is in NHWC, else NCHW."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One convolution, in another layout where oneDNN has no fast kernel for the layout of x.

    Measured on AVX-512 for every dtype and map: in NCHW, kernels of more than 14 columns take 8 to
    30 times longer; in NHWC, those of 11 to 14 columns take up to twice as long. A kernel with few
    rows is then convolved with H and W exchanged, any other in the other layout. The figures
    include the copies.
    """
    layout = layout_of(x)
    in_nchw = layout == torch.contiguous_format
    other = torch.channels_last if in_nchw else torch.contiguous_format
    rows, columns = weight.shape[2:]
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
