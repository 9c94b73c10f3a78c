"""Depthwise convolution with large kernels: one entry, several backends."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

BACKENDS = ('auto', 'native')


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = 'auto'
) -> Tensor:
    """Convolves every channel with its own kernel: stride 1, 'same' zero padding.

    Args:
        x: Input of shape (N, C, H, W), any memory format.
        weight: Kernels of shape (C, 1, kH, kW), both sides odd, of any ratio.
        bias: Shape (C,) or None.
        backend: 'native' is `torch.nn.functional.conv2d` in the layout that it is fast in; 'auto'
            chooses.

    Returns:
        Tensor of x's shape.

    Raises:
        ValueError: On an unknown backend, shapes that do not fit or an even kernel side.
    """
    _check(x, weight, bias, backend)
    return _native(x, weight, bias)


def depthwise_conv2d_branches(
    x: Tensor, weights: Sequence[Tensor], backend: str = 'auto'
) -> list[Tensor]:
    """Convolves x with several sets of kernels: one output of x's shape per element of `weights`.

    Arguments and errors are those of `depthwise_conv2d`.
    """
    return [depthwise_conv2d(x, weight, backend=backend) for weight in weights]


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    height, width = weight.shape[2:]
    # oneDNN takes 30 times longer for a wide strip than for the same strip upright, unless the
    # memory is NHWC.
    if x.device.type == 'cpu' and width > 2 * height and x.is_contiguous():
        upright = _native(x.transpose(2, 3).contiguous(), weight.transpose(2, 3).contiguous(), bias)
        return upright.transpose(2, 3).contiguous()
    return F.conv2d(x, weight, bias, padding=(height // 2, width // 2), groups=x.shape[1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend {backend!r}: expected one of {", ".join(BACKENDS)}')
    if x.dim() != 4:
        raise ValueError(f'x: expected (N, C, H, W), got shape {tuple(x.shape)}')
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f'weight: expected ({channels}, 1, kH, kW) for x of {channels} channels, '
            f'got shape {tuple(weight.shape)}'
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'weight: expected odd kernel sides, got {tuple(weight.shape[2:])}')
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f'bias: expected shape ({channels},), got {tuple(bias.shape)}')
