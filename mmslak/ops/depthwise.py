"""Depthwise convolution with large kernels: one entry, several backends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmslak.ops import native, triton_backend
from mmslak.ops.choice import choose, plain_calls
from mmslak.ops.custom_op import convolve_branches, convolve_in_graph
from mmslak.ops.function import (
    autocast_dtype,
    learns,
    transforms_run,
    wanted_gradients,
    without_autocast,
)
from mmslak.ops.methods import compute_forward, merges
from mmslak.ops.rule import SMALL

_is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)  # of torch 2.1
_PLAIN_TYPES = (Tensor, nn.Parameter)
BACKENDS = ('auto', 'native', 'fft', 'toeplitz', 'triton')


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
            through the FFT in chunks of channels, 'toeplitz' through banded matrix products,
            'triton' through one fused kernel of such products on an NVIDIA GPU; 'auto' chooses by
            device, dtype and shape (`mmslak.ops.choice`).

    Returns:
        Tensor of x's shape, in NHWC (channels_last) if x is in NHWC or a slice of such a map, else
        in NCHW; under autocast of its dtype, as `torch.nn.functional.conv2d`. Second derivatives
        are not defined. Under `torch.func` and in forward mode it is torch's plain convolution,
        which has them all.

    Raises:
        ValueError: On an unknown backend, a backend that cannot run here, shapes or dtypes that do
            not fit or an even kernel side.
    """
    call = None
    if backend == 'auto' and not _is_compiling() and not _is_dispatched(x):
        call = _signature(x, weight)
        # The checks and the choice would take longer than a small convolution.
        if call in plain_calls:
            rows, columns = weight.shape[2:]
            return F.conv2d(x, weight, bias, 1, (rows // 2, columns // 2), 1, len(weight))
    return _call(x, [weight], bias, backend, summed=True, call=call)[0]


def depthwise_conv2d_branches(
    x: Tensor, weights: Sequence[Tensor], backend: str = 'auto'
) -> list[Tensor]:
    """Convolves x with several sets of kernels: one output of x's shape per element of `weights`.

    Work on x and on the output gradients is shared between the branches. Arguments and errors are
    those of `depthwise_conv2d`.
    """
    return _call(x, weights, None, backend, summed=False)


def depthwise_conv2d_sum(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, backend: str = 'auto'
) -> Tensor:
    """Sum of the branches of `depthwise_conv2d_branches` plus bias, without its terms in memory.

    A block of SLaK whose norms are fused is such a sum. Arguments and errors are those of
    `depthwise_conv2d`.
    """
    return _call(x, weights, bias, backend, summed=True)[0]


class DepthwiseConv2d(nn.Conv2d):
    """`depthwise_conv2d` as a layer: an nn.Conv2d with one kernel per channel, stride 1, 'same'
    padding.

    Args:
        channels: Channels of input and output.
        kernel_size: Side, or (height, width); odd.
        bias: Whether to add one.
        conv_backend: Backend of `depthwise_conv2d`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        conv_backend: str = 'auto',
    ) -> None:
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        padding = (sides[0] // 2, sides[1] // 2)
        super().__init__(channels, channels, sides, padding=padding, groups=channels, bias=bias)
        self.conv_backend = conv_backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), or without the batch, as nn.Conv2d."""
        if x.dim() == 3:
            return depthwise_conv2d(x[None], self.weight, self.bias, self.conv_backend)[0]
        return depthwise_conv2d(x, self.weight, self.bias, self.conv_backend)


def _signature(x: Tensor, weight: Tensor) -> tuple:
    """All that the choice depends on; torch itself checks dtypes, devices and the bias."""
    gradients = torch.is_grad_enabled()
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        gradients and x.requires_grad,
        weight.shape,
        gradients and weight.requires_grad,
        autocast_dtype(x.device.type) if torch._C._is_any_autocast_enabled() else None,
        torch.get_num_threads(),
    )


def _call(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    backend: str,
    summed: bool,
    call: tuple | None = None,
) -> list[Tensor]:
    weights = list(weights)
    _check(x, weights, bias, backend)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, *weights = (_cast(tensor, dtype) for tensor in (x, *weights))
        bias = None if bias is None else _cast(bias, dtype)
    _check_dtypes(x, weights, bias)
    if is_exporting() or is_transformed():
        return native.plain_branches(x, weights, bias, summed)
    compiling = is_compiling()
    if backend == 'triton' and not compiling:  # there the operator checks when it runs
        triton_backend.check(x, weights, bias)
    in_graph = compiling or _is_dispatched(x)  # where the choice is not made here
    large = weights  # the kernels that remain when others are merged into them
    if summed and len(weights) > 1 and in_graph and backend != 'triton':
        large = weights = native.merge_kernels(weights)
    elif summed and len(weights) > 1:
        large = [group[0] for group in native.group_kernels(weights)]
    if compiling and backend == 'auto' and max(max(w.shape[2:]) for w in weights) < SMALL:
        # Inductor fuses torch's own convolution with what is around it.
        return native.plain_branches(x, weights, bias, summed)
    if compiling:
        return convolve_in_graph(x, weights, bias, backend, summed)
    if in_graph:
        return convolve_branches(x, weights, bias, backend, summed)
    plan = choose(backend, x, large, summed, *wanted_gradients(x, weights), call=call)
    if large is not weights and not merges(plan):
        weights = native.merge_kernels(weights)
    if plan.plain:
        return native.plain_branches(x, weights, bias, summed)
    if learns(x, weights, bias):
        return convolve_branches(x, weights, bias, backend, summed, plan)
    with without_autocast(x):  # autograd's own work would take longer than a small convolution
        return compute_forward(plan.forward, x, weights, bias, summed)


def _is_dispatched(x: Tensor) -> bool:
    """Whether x is no plain tensor, or a mode watches operators: they see ours as one operator."""
    return type(x) not in _PLAIN_TYPES or torch._C._len_torch_dispatch_stack() > 0


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts as autocast does, which leaves double precision alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation runs, which our operator does not support.

    Under torch.compile this is found out later, while its graph is traced.
    """
    return not is_compiling() and transforms_run()


def is_compiling() -> bool:
    """Whether torch.compile traces the code that runs."""
    return _is_compiling()


def is_exporting() -> bool:
    """Whether a graph is traced or exported, which then gets plain convolutions.

    torch 2.1 cannot tell torch.export from torch.compile.
    """
    exporting = getattr(torch.compiler, 'is_exporting', lambda: False)()
    return exporting or torch.jit.is_tracing()  # as the older ONNX exporter does


def _check(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend {backend!r}: expected one of {", ".join(BACKENDS)}')
    if x.dim() != 4:
        raise ValueError(f'x: expected (N, C, H, W), got shape {tuple(x.shape)}')
    if any(size == 0 for size in x.shape[1:]):
        raise ValueError(f'x: expected channels and a map, got shape {tuple(x.shape)}')
    channels = x.shape[1]
    if not weights:
        raise ValueError('weights: expected at least one set of kernels')
    for weight in weights:
        if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
            raise ValueError(
                f'weight: expected ({channels}, 1, kH, kW) for x of {channels} channels, '
                f'got shape {tuple(weight.shape)}'
            )
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
            raise ValueError(f'weight: expected odd kernel sides, got {tuple(weight.shape[2:])}')
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f'bias: expected shape ({channels},), got {tuple(bias.shape)}')


def _check_dtypes(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f'x: expected a floating dtype, got {x.dtype}')
    named = [('weight', weight) for weight in weights]
    for name, tensor in named if bias is None else [*named, ('bias', bias)]:
        if tensor.dtype != x.dtype:
            raise ValueError(f'{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}')
