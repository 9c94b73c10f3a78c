"""PyTorch's own depthwise convolution, in the layout in which it is fast."""

import functools
import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmslak.ops.layouts import NCHW, in_layout, layout_of, other

WAYS = ('conv', 'turned', 'other')  # in which torch's convolution is called
WIDE = 14  # columns of a kernel beyond which oneDNN has no fast kernel for maps in NCHW


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    summed: bool = False,
    way: str | None = None,
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias.

    Args:
        x: (N, C, H, W).
        weights: The kernels.
        bias: Shape (C,) or None; only where summed.
        summed: Whether the outputs are added up.
        way: How torch's convolution is called: 'conv' in the layout of x, 'turned' with H and W
            exchanged, 'other' in the other layout; None takes the one that is usually fast.
    """
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    if not summed:
        return [convolve(x, weight, None, way) for weight in weights]
    first, *others = weights
    total = convolve(x, first, bias, way)
    for weight in others:
        total = total + convolve(x, weight, None, way)
    return [total]


def convolve_each(
    one: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    summed: bool,
) -> list[Tensor]:
    """`forward` of a method that convolves x with one kernel at a time."""
    weights = [crop_to_map(weight, x.shape) for weight in weights]
    if not summed:
        return [one(x, weight) for weight in weights]
    total = sum(one(x, weight) for weight in weights)
    return [total if bias is None else total + bias.view(-1, 1, 1)]


def plain_branches(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """As `forward`, by one plain convolution per kernel and nothing else, with torch's autograd."""
    outputs = [plain(x, weight, None if i else bias) for i, weight in enumerate(weights)]
    # Not `sum` with a start, which splits compiled graphs of torch 2.1.
    return [functools.reduce(operator.add, outputs)] if summed else outputs


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
    way: str | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels; `gradients` holds one per kernel or one for their sum.

    Of the ways, 'conv' is torch's own backward function in the layout of x. The others convolve
    with flipped kernels for the gradient of x: 'flipped' in the layout of x, 'turned' and 'other'
    as in `forward`.
    """
    if len(gradients) < len(weights):
        gradients = list(gradients) * len(weights)
    dx, dws = None, [torch.zeros_like(weight) for weight in weights] if weight_gradients else None
    for i, gradient in enumerate(gradients):
        weight, term = crop_to_map(weights[i], x.shape), None
        # oneDNN's kernel for the gradient of the input is up to twice as slow as its forward one.
        by_torch = way == 'conv' or (way is None and x.device.type != 'cpu')
        if weight_gradients or (input_gradient and by_torch):
            mask = [input_gradient and by_torch, weight_gradients, False]
            term, dw = _torch_backward(gradient, x, weight, mask, way)
            if weight_gradients:
                crop_to_map(dws[i], x.shape).copy_(dw)
        if input_gradient and not by_torch:
            term = convolve(gradient, weight.flip(2, 3), None, way)
        if input_gradient:
            dx = term if dx is None else dx.add_(term)
    return dx, dws


def _torch_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mask: list[bool], way: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of one kernel by torch's backward function of a convolution."""
    layout = layout_of(x)
    weight = _not_as_nhwc(weight)
    if way == 'other':
        layout = other(layout)
    if way == 'turned':
        gradient, x, weight = (t.transpose(2, 3) for t in (gradient, x, weight))
    gradient, x = (in_layout(t, layout) for t in (gradient, x))
    arguments = [None, (1, 1), _padding(weight), (1, 1), False, (0, 0), len(weight)]
    dx, dw, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *arguments, mask)
    if way == 'turned':
        dx, dw = (t if t is None else t.transpose(2, 3) for t in (dx, dw))
    return dx, dw


def crop_to_map(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The centre of kernels that meets pixels of a map; the entries around it only meet padding.

    Args:
        weight: Kernels (C, 1, kH, kW).
        shape: (N, C, H, W) of the map.

    Returns:
        (C, 1, at most 2 H - 1, at most 2 W - 1), a view if anything is cut off.
    """
    for dim in (2, 3):
        beyond = weight.shape[dim] // 2 - (shape[dim] - 1)
        if beyond > 0:
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
    merged = []
    for total, *others in group_kernels(weights):
        for weight in others:
            rows, columns = (total.shape[d] - weight.shape[d] for d in (2, 3))
            total = total + F.pad(weight, (columns // 2, columns // 2, rows // 2, rows // 2))
        merged.append(total)
    return merged


def group_kernels(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Kernels by falling area, each with those that `merge_kernels` adds to it."""
    groups: list[list[Tensor]] = []
    for weight in sorted(weights, key=lambda w: -w.shape[2] * w.shape[3]):
        for group in groups:
            height, width = group[0].shape[2:]
            if weight.shape[2] <= height and weight.shape[3] <= width:
                group.append(weight)
                break
        else:
            groups.append([weight])
    return groups


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    way: str | None = None,
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """One convolution, in one of the ways of `forward`; its output has the layout of x.

    Args:
        x: (N, C, H, W).
        weight: Kernels (C, 1, kH, kW).
        bias: Shape (C,) or None.
        way: As in `forward`.
        call: What convolves as `plain`, which None is.
    """
    call = call or plain
    layout = layout_of(x)
    way = way or usual_way(x, weight)
    weight = _not_as_nhwc(weight)
    if way == 'turned':
        x, weight = (t.transpose(2, 3).contiguous(memory_format=layout) for t in (x, weight))
        return call(x, weight, bias).transpose(2, 3).contiguous(memory_format=layout)
    used = other(layout) if way == 'other' else layout
    return in_layout(call(in_layout(x, used), weight, bias), layout)


def _not_as_nhwc(weight: Tensor) -> Tensor:
    """The kernels (C, 1, kH, kW), with strides that torch does not take for NHWC.

    It copies x to NHWC where the kernels are in it. So they are in a model that was converted to
    channels_last, though in memory they are as before.
    """
    return weight.squeeze(1).unsqueeze(1)


def usual_way(x: Tensor, weight: Tensor) -> str:
    """Another way than 'conv' where oneDNN has no fast kernel for the layout of x.

    Measured on AVX-512 for every dtype and map: in NCHW, kernels of more than 14 columns take 8 to
    30 times longer; in NHWC, those of 11 to 14 columns take up to twice as long. A kernel with few
    rows is then convolved with H and W exchanged, any other in the other layout. The figures
    include the copies.
    """
    in_nchw = layout_of(x) == NCHW
    rows, columns = weight.shape[2:]
    slow = columns > WIDE if in_nchw else 10 < columns <= WIDE
    if x.device.type != 'cpu' or not slow:
        return 'conv'
    return 'turned' if rows <= (WIDE if in_nchw else 10) else 'other'


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's convolution as it is."""
    return F.conv2d(x, weight, bias, padding=_padding(weight), groups=weight.shape[0])


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2
