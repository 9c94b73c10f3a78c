"""The operator in a network that knows nothing of it."""

from torch import nn

from mmslak.ops.depthwise import DepthwiseConv2d

MIN_SIZE = 7  # longer side of the kernels from which on convolutions are changed
# Other subclasses may compute something else. mmcv's is nn.Conv2d on every torch from 1.5 on.
PLAIN = ('torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d')


def accelerate(model: nn.Module, min_size: int = MIN_SIZE) -> int:
    """Makes the large depthwise convolutions of a model `DepthwiseConv2d`, in place.

    Each of `replaceable(model, min_size)` gets another class and stays the object that it is: its
    name, parameters, hooks and state_dict do not change, nor does what an optimizer holds.

    Args:
        model: Any model, also one that is a single convolution, on any device.
        min_size: Least longer side of the kernels, in pixels.

    Returns:
        How many convolutions were changed; those that were `DepthwiseConv2d` before do not count.

    Examples:
        >>> from torch import nn
        >>> from mmslak.ops import accelerate
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 31, padding=15, groups=8))
        >>> accelerate(model)
        1
    """
    convolutions = replaceable(model, min_size)
    for convolution in convolutions:
        convolution.__class__ = DepthwiseConv2d
        convolution.conv_backend = 'auto'
    return len(convolutions)


def replaceable(model: nn.Module, min_size: int = MIN_SIZE) -> list[nn.Conv2d]:
    """The convolutions that `accelerate` changes; one that a model has in two places comes once.

    They are nn.Conv2d or mmcv's wrapper of it, depthwise (as many groups as channels in and out),
    of stride 1 and dilation 1, with odd sides and as many zeros around the map as keep its size.
    Subclasses stay as they are, and so do convolutions with a `forward` of their own.
    """
    return [
        module
        for module in model.modules()
        if f'{type(module).__module__}.{type(module).__qualname__}' in PLAIN
        and 'forward' not in vars(module)
        and _fits(module)
        and max(module.kernel_size) >= min_size
    ]


def _fits(convolution: nn.Conv2d) -> bool:
    """Whether `DepthwiseConv2d` computes the same."""
    sides = convolution.kernel_size
    return (
        convolution.groups == convolution.in_channels == convolution.out_channels
        and convolution.stride == convolution.dilation == (1, 1)
        and all(side % 2 == 1 for side in sides)
        and convolution.padding in ('same', tuple(side // 2 for side in sides))
        and convolution.padding_mode == 'zeros'
        and convolution.weight.is_floating_point()
    )
