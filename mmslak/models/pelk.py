"""PeLK: peripheral convolutions up to 101×101 in SLaK's design.

PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution (CVPR 2024, arXiv
2403.07589). There is no official code: docs/pelk.md lists what is inferred.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.fused import KeepsFused
from mmslak.models.hooks import has_hooks, make_permanent
from mmslak.models.norm import build_norm, fold, fold_sources, is_fixed
from mmslak.models.peripheral import PeripheralConv2d
from mmslak.ops import (
    DepthwiseConv2d,
    depthwise_conv2d,
    depthwise_conv2d_branches,
    is_compiling,
    is_exporting,
    merge_kernels,
)
from mmslak.registry import MODELS


class PartialPeripheralConv2d(KeepsFused):
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
        self.small = self.small_bn = None
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
        if self._can_be_fused():
            sources = [s for conv, bn in self._branches() for s in fold_sources(conv.weight, bn)]
            fused = self.keep([*sources, embedding], partial(self._fused, embedding))
            kernel, bias, position = fused
            y = depthwise_conv2d(convolved, kernel, bias, self.conv_backend)
        else:
            y, kernel = self._by_branches(convolved)
            position = None if embedding is None else kernel.squeeze(1) * embedding
        if position is not None:
            y = y + self.peripheral.positional_term(position, x.shape[2:]).to(y.dtype)
        return torch.cat([y, passed], 1)

    def _by_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the normalised branches, and the dense peripheral kernel."""
        convs, norms = zip(*self._branches(), strict=True)
        if self._must_be_called():
            outputs = [conv(x) for conv in convs]
            kernel = self.peripheral.kernel()
        else:
            kernel = self.peripheral.kernel()
            kernels = [kernel, *(conv.weight for conv in convs[1:])]
            outputs = depthwise_conv2d_branches(x, kernels, self.conv_backend)
        first, *others = (norm(output) for norm, output in zip(norms, outputs, strict=True))
        return sum(others, first), kernel

    def _branches(self) -> list[tuple[nn.Module, nn.Module]]:
        """The convolutions, each with its norm, the peripheral one first."""
        branches = [(self.peripheral, self.peripheral_bn), (self.small, self.small_bn)]
        return [branch for branch in branches if branch[0] is not None]

    def _can_be_fused(self) -> bool:
        if is_compiling() and not hasattr(torch.library, 'custom_op'):
            return False  # torch 2.1 fails on it where it makes symbols of the sizes
        norms = [norm for _, norm in self._branches()]
        fixed = all(is_fixed(norm) for norm in norms) and not has_hooks(*norms)
        return fixed and not self._must_be_called() and not is_exporting()

    def _fused(self, embedding: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kernel (C, 1, K, K) and bias (C,) that do what all does in eval mode, and w·h (C, K, K)
        of a strict embedding, which is no constant of the channel.

        Raises:
            TypeError: See `fold`.
        """
        own = self.peripheral.kernel()
        kernels = [own] if self.small is None else [own, self.small.weight]
        norms = [norm for _, norm in self._branches()]
        kernels, biases = zip(*map(fold, kernels, norms), strict=True)
        (kernel,), bias = merge_kernels(kernels), sum(biases)
        position = None if embedding is None else own.squeeze(1) * embedding
        if position is not None and not self.peripheral.strict_borders:
            bias, position = bias + position.sum((1, 2)), None
        return kernel.to(own.dtype), bias.to(own.dtype), position

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
        for branch, _ in self._branches():
            make_permanent(branch)
        kernel, bias, _ = self._fused(embedding)
        conv.switch_to_deploy(embedding)
        conv.weight.copy_(kernel)
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
        self.small = self.small_bn = self.peripheral_bn = None
        self.deployed, self._kept = True, None


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
            hidden_channels, out_indices, drop_path_rate, layer_scale_init_value, norm_cfg,
            gap_before_final_norm, frozen_stages, norm_eval, with_cp, conv_backend, init_cfg.

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

    def _fuse_stage(self, stage: nn.Sequential) -> None:
        """Makes every block's kernels, norms and embedding one dense kernel."""
        for block in stage:
            block.large_kernel.switch_to_deploy(stage.position_embedding)
        stage.position_embedding = None
