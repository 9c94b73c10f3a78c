"""Memory layouts of maps: NCHW, and NHWC (channels_last)."""

import math

import torch
from torch import Tensor

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# Elements of an image, and its pixels, up to which torch's own copy is as fast (one CPU, AVX-512).
FEW, PIXELS = 1 << 15, 1 << 12
ROWS = 8  # of an image, in all its channels, that are read together
CHANNELS = 16  # that are written together


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that outputs for x have, as those of torch's own convolution.

    NHWC (channels_last) if x is in NHWC or is a slice of such a map, such as some of its channels;
    else NCHW.
    """
    if x.is_contiguous():
        return NCHW
    (_, channels, height, width), (image, channel, row, column) = x.shape, x.stride()
    nhwc = channel == 1 and column >= channels and row >= width * column and image >= height * row
    return NHWC if nhwc else NCHW


def other(layout: torch.memory_format) -> torch.memory_format:
    """NHWC for NCHW, NCHW for NHWC."""
    return NHWC if layout == NCHW else NCHW


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x, copied if it has another layout; as `x.contiguous(memory_format=layout)`.

    On a CPU it is copied in blocks that stay in the cache. torch copies element by element in the
    order of the output, and reads each line of the cache anew for every element in it. Where a
    graph is traced, it is torch's copy: one node, which a compiler makes a loop of.

    Args:
        x: (N, C, H, W).
        layout: `NCHW` or `NHWC`.
    """
    between = layout_of(x) == NHWC if layout == NCHW else x.is_contiguous()
    few = math.prod(x.shape[2:]) <= PIXELS if layout == NCHW else math.prod(x.shape[1:]) <= FEW
    traced = torch._C._len_torch_dispatch_stack() > 0
    done = x.is_contiguous(memory_format=layout)
    if x.device.type != 'cpu' or not between or few or done or traced:
        return x.contiguous(memory_format=layout)
    copy = torch.empty_like(x, memory_format=layout)
    step, dim = (ROWS, 1) if layout == NCHW else (CHANNELS, 0)
    for image, target in zip(x, copy):
        for block, place in zip(image.split(step, dim), target.split(step, dim)):
            place.copy_(block)
    return copy
