"""PeLK: peripheral convolutions up to 101×101 in SLaK's design.

PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution (CVPR 2024, arXiv
2403.07589). There is no official code: docs/pelk.md lists what is inferred.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.hooks import has_hooks, make_permanent
from mmslak.models.norm import build_norm, fold
from mmslak.models.peripheral import PeripheralConv2d
from mmslak.ops import DepthwiseConv2d, depthwise_conv2d_branches, merge_kernels
from mmslak.registry import MODELS


class PartialPeripheralConv2d(nn.Module):
    """Peripheral convolution of the first channels; the others pass.

    The peripheral kernel and a small dense one run in parallel, each with its norm, as SLaK's
    branches. The term of the positional embedding is added after the norm, which would cancel it.

    Args:
        channels: Channels of input and output.
        kernel_size: K, odd.
        center: Rows and columns in the middle of the kernel that share nothing, odd.
        small_kernel: Side of the small kernel, odd and smaller than K; None leaves it out.
        conv_ratio: Share of the channels that are convolved.
        strict_borders: The strict form of the embedding, see `PeripheralConv2d`.
        norm_cfg: Config of the norm after each kernel.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.

    Raises:
        ValueError: On even or contradictory kernel sides, or a ratio without a channel to convolve.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        center: int = 5,
        small_kernel: int | None = 5,
        conv_ratio: float = 3 / 8,
        strict_borders: bool = False,
        norm_cfg: dict | None = None,
        conv_backend: str = 'auto',
    ) -> None:
        super().__init__()
        convolved = int(channels * conv_ratio)
        if not 1 <= convolved <= channels:
            raise ValueError(f'conv_ratio: expected a share of {channels} channels, {conv_ratio=}')
        if small_kernel is not None and not (small_kernel % 2 and small_kernel < kernel_size):
            raise ValueError(
                f'small_kernel must be odd and smaller than the kernel, got '
                f'{small_kernel} and {kernel_size}'
            )
        self.sizes = (convolved, channels - convolved)
        self.conv_backend = conv_backend
        self.deployed = False
        self.peripheral = PeripheralConv2d(
            convolved, kernel_size, center, strict_borders, conv_backend
        )
        self.peripheral_bn = build_norm(norm_cfg, convolved)
        self.small = None
        if small_kernel is not None:
            self.small = DepthwiseConv2d(
                convolved, small_kernel, bias=False, conv_backend=conv_backend
            )
            self.small_bn = build_norm(norm_cfg, convolved)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, H, W) and an embedding (convolved channels, K, K) to (N, C, H, W)."""
        convolved, passed = x.split(self.sizes, 1)
        if self.deployed:
            return torch.cat([self.peripheral(convolved), passed], 1)
        if self._must_be_called():
            convs = [self.peripheral] if self.small is None else [self.peripheral, self.small]
            outputs = [conv(convolved) for conv in convs]
            kernel = self.peripheral.kernel()
        else:
            kernel = self.peripheral.kernel()
            kernels = [kernel] if self.small is None else [kernel, self.small.weight]
            outputs = depthwise_conv2d_branches(convolved, kernels, self.conv_backend)
        y = self.peripheral_bn(outputs[0])
        if self.small is not None:
            y = y + self.small_bn(outputs[1])
        if embedding is not None:
            term = self.peripheral.positional_term(kernel.squeeze(1) * embedding, x.shape[2:])
            y = y + term.to(y.dtype)
        return torch.cat([y, passed], 1)

    def _must_be_called(self) -> bool:
        """Whether reading the kernels is not enough, see `Branch.must_be_called`."""
        peripheral, small = self.peripheral, self.small
        if type(peripheral) is not PeripheralConv2d or has_hooks(peripheral):
            return True
        if small is None:
            return False
        return type(small) is not DepthwiseConv2d or small.bias is not None or has_hooks(small)

    @torch.no_grad()
    def switch_to_deploy(self, embedding: Tensor | None = None) -> None:
        """Makes kernels, norms and embedding one dense kernel and bias; eval outputs stay."""
        if self.deployed:
            return
        conv = self.peripheral
        make_permanent(conv)
        kernel, bias = fold(conv.kernel(), self.peripheral_bn)
        if self.small is not None:
            make_permanent(self.small)
            small, small_bias = fold(self.small.weight, self.small_bn)
            (kernel,) = merge_kernels([kernel, small])
            bias = bias + small_bias
            self.small = self.small_bn = None
        conv.switch_to_deploy(embedding)
        if conv.bias is not None:
            bias = bias + conv.bias
        conv.weight.copy_(kernel)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        self.peripheral_bn = None
        self.deployed = True


class PeLKStage(nn.Sequential):
    """Blocks whose peripheral kernels share one positional embedding (C, K, K)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        conv = blocks[0].large_kernel.peripheral
        shape = (conv.channels, conv.kernel_size, conv.kernel_size)
        self.position_embedding = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x, self.position_embedding)
        return x


@MODELS.register_module()
class PeLK(LargeKernelBackbone):
    """PeLK backbone; PeLK-T, -S and -B are 'tiny', 'small' and 'base'.

    The 101 variant of base is `kernel_sizes=(101, 69, 67, 13), center=7`. Everything but the large
    kernels is SLaK's.

    Args:
        arch: 'tiny', 'small', 'base' or dict(depths=…, dims=…), `dims` before the width factor.
        center: Rows and columns in the middle of the kernels that share nothing, odd: 5, and 7 for
            the 101 variant.
        small_kernel: Side of the dense kernel in parallel, as SLaK's; None leaves it out.
        conv_ratio: Share of the channels that are convolved, the first ones; the others pass.
        strict_borders: The positional embedding counts only where the kernel is inside the map; see
            `PeripheralConv2d`.
        kwargs: Those of `LargeKernelBackbone`: in_channels, kernel_sizes, width_factor,
            out_indices, drop_path_rate, layer_scale_init_value, norm_cfg, gap_before_final_norm,
            frozen_stages, norm_eval, with_cp, conv_backend, init_cfg.

    Raises:
        TypeError: On an unknown argument.
        ValueError: On an unknown arch, lengths that do not agree or kernel sides that do not fit.
    """

    stage_type = PeLKStage

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        center: int = 5,
        small_kernel: int | None = 5,
        conv_ratio: float = 3 / 8,
        strict_borders: bool = False,
        **kwargs,
    ) -> None:
        large_kernel = partial(
            PartialPeripheralConv2d,
            center=center,
            small_kernel=small_kernel,
            conv_ratio=conv_ratio,
            strict_borders=strict_borders,
        )
        super().__init__(large_kernel, arch, **kwargs)

    def switch_to_deploy(self) -> None:
        """Makes every block's kernels, norms and embedding one dense kernel; eval outputs stay."""
        for stage in self.stages:
            for block in stage:
                block.large_kernel.switch_to_deploy(stage.position_embedding)
            stage.position_embedding = None
