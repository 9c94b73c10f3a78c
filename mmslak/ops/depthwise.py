"""Depthwise convolution with large kernels: one entry, several backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fft, native, toeplitz
from .choice import choose

BACKENDS = ('auto', 'native', 'fft', 'toeplitz')


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = 'auto'
) -> Tensor:
    """Convolves every channel with its own kernel: stride 1, 'same' zero padding.

    Args:
        x: Input of shape (N, C, H, W), any memory format, floating dtype. The FFT computes half
            precision in float32 and rounds at the end.
        weight: Kernels of shape (C, 1, kH, kW), both sides odd, of any ratio, also larger than x.
        bias: Shape (C,) or None.
        backend: 'native' is torch's convolution in the layout that it is fast in, 'fft' goes
            through the FFT in chunks of channels, 'toeplitz' through banded matrix products;
            'auto' chooses by device, dtype and shape.

    Returns:
        Tensor of x's shape; under autocast of its dtype, as `torch.nn.functional.conv2d`.

    Raises:
        ValueError: On an unknown backend, shapes that do not fit or an even kernel side.
    """
    (output,) = depthwise_conv2d_branches(x, [weight], backend)
    if bias is None:
        return output
    if tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f'bias: expected shape ({x.shape[1]},), got {tuple(bias.shape)}')
    return output + bias.to(output.dtype).view(-1, 1, 1)


def depthwise_conv2d_branches(
    x: Tensor, weights: Sequence[Tensor], backend: str = 'auto'
) -> list[Tensor]:
    """Convolves x with several sets of kernels: one output of x's shape per element of `weights`.

    Work on x and on the output gradients is shared between the branches. Arguments and errors are
    those of `depthwise_conv2d`.
    """
    weights = list(weights)
    _check(x, weights, backend)
    device = x.device.type
    if torch.is_autocast_enabled() if device == 'cuda' else _cpu_autocast(device):
        dtype = (
            torch.get_autocast_gpu_dtype() if device == 'cuda' else torch.get_autocast_cpu_dtype()
        )
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    if torch.jit.is_tracing():  # an exported graph has plain convolutions
        return [native.forward(x, weight) for weight in weights]
    return list(_Branches.apply(x, backend, *weights))


def _cpu_autocast(device: str) -> bool:
    return device == 'cpu' and torch.is_autocast_cpu_enabled()


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, backend: str, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.methods = choose(backend, x, [tuple(w.shape[2:]) for w in weights])
        if ctx.methods.forward == 'fft':
            return tuple(fft.forward(x, weights))
        method = {'native': native, 'toeplitz': toeplitz}[ctx.methods.forward]
        return tuple(method.forward(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, _, *need_weights = ctx.needs_input_grad
        need_weights = any(need_weights)
        dx = dws = None
        by_fft = [
            need_x and ctx.methods.input_gradient == 'fft',
            need_weights and ctx.methods.weight_gradient == 'fft',
        ]
        if any(by_fft):
            dx, dws = fft.backward(x, weights, gradients, *by_fft)
        pairs = list(zip(weights, gradients, strict=True))
        if need_x and dx is None:
            if ctx.methods.input_gradient == 'toeplitz':
                dx = sum(toeplitz.input_gradient(w, g) for w, g in pairs)
            else:
                dx = sum(native.input_gradient(x, w, g) for w, g in pairs)
        if need_weights and dws is None:
            if ctx.methods.weight_gradient == 'toeplitz':
                dws = [toeplitz.weight_gradient(x, g, tuple(w.shape[2:])) for w, g in pairs]
            else:
                dws = [native.weight_gradient(x, w, g) for w, g in pairs]
        return dx, None, *(dws or [None] * len(weights))


def _check(x: Tensor, weights: Sequence[Tensor], backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend {backend!r}: expected one of {", ".join(BACKENDS)}')
    if x.dim() != 4:
        raise ValueError(f'x: expected (N, C, H, W), got shape {tuple(x.shape)}')
    channels = x.shape[1]
    for weight in weights:
        if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
            raise ValueError(
                f'weight: expected ({channels}, 1, kH, kW) for x of {channels} channels, '
                f'got shape {tuple(weight.shape)}'
            )
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
            raise ValueError(f'weight: expected odd kernel sides, got {tuple(weight.shape[2:])}')
