"""Stands in for the CUDA extension of RepLKNet, SLaK and UniRepLKNet, whose module has this name.

`mmslak ops-path` prints the folder. docs/operator.md says how those repositories find it.
"""

from mmslak.ops import DepthwiseConv2d

__all__ = ['DepthWiseConv2dImplicitGEMM']


class DepthWiseConv2dImplicitGEMM(DepthwiseConv2d):
    """`mmslak.ops.DepthwiseConv2d` with the extension's name and arguments.

    The weight has the extension's name and shape (channels, 1, height, width), so that checkpoints
    load either way. It runs on every device, in every floating dtype.

    Args:
        channels: Channels of input and output.
        kernel: Side, or (height, width); odd.
        bias: Whether to add one.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False) -> None:
        super().__init__(channels, kernel, bias=bias)
