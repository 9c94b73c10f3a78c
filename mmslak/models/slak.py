"""SLaK: a ConvNeXt with 51×51 kernels, each split into two strips and a small kernel.

More ConvNets in the 2020s: Scaling up Kernels Beyond 51×51 using Sparsity (ICLR 2023, arXiv
2207.03620).
"""

from functools import partial

import torch
from torch import Tensor, nn

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.fused import KeepsFused
from mmslak.models.hooks import has_hooks, make_permanent
from mmslak.models.norm import build_norm, fold, fold_sources, is_fixed
from mmslak.ops import (
    DepthwiseConv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_sum,
    is_exporting,
    merge_kernels,
)
from mmslak.registry import MODELS


class Branch(nn.Module):
    """One depthwise kernel and its norm, `conv` + `bn`.

    Args:
        channels: Channels of input and output.
        kernel_size: (height, width), both odd.
        norm_cfg: Config of the norm.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        norm_cfg: dict | None = None,
        conv_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(channels, kernel_size, bias=False, conv_backend=conv_backend)
        self.bn = build_norm(norm_cfg, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return self.bn(self.conv(x))

    def must_be_called(self) -> bool:
        """Whether the branch does more than its weight and norm: it has hooks, or its convolution
        was replaced by another layer."""
        return type(self.conv) is not DepthwiseConv2d or has_hooks(self, self.conv, self.bn)


class LargeKernelConv2d(KeepsFused):
    """Depthwise K×K convolution, as two strips and a small kernel or as one square kernel.

    Decomposed: `vertical` (K×N) + `horizontal` (N×K) + `small` (N×N). Otherwise `square` (K×K),
    plus `small` unless small_kernel is None. Every branch is normalised before the sum.
    Sources: SLaK (arXiv 2207.03620) and, for the square form, RepLKNet (arXiv 2203.06717).

    Args:
        channels: Channels of input and output.
        kernel_size: K, odd.
        small_kernel: N, odd and smaller than K; None only for square kernels.
        decomposed: Two strips instead of the square.
        norm_cfg: Config of the norm after each branch.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.

    Raises:
        ValueError: On even, missing or contradictory kernel sides.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        decomposed: bool = True,
        norm_cfg: dict | None = None,
        conv_backend: str = 'auto',
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or (small_kernel is not None and small_kernel % 2 == 0):
            raise ValueError(f'kernel sides must be odd, got {kernel_size} and {small_kernel}')
        if decomposed and small_kernel is None:
            raise ValueError('a decomposed kernel needs small_kernel, the short side of its strips')
        if small_kernel is not None and small_kernel >= kernel_size:
            raise ValueError(
                f'small_kernel must be smaller than the kernel, got '
                f'{small_kernel} and {kernel_size}'
            )
        self.conv_backend = conv_backend
        self.deployed = False
        sizes = {}
        if decomposed:
            sizes['vertical'] = (kernel_size, small_kernel)
            sizes['horizontal'] = (small_kernel, kernel_size)
        else:
            sizes['square'] = (kernel_size, kernel_size)
        if small_kernel is not None:
            sizes['small'] = (small_kernel, small_kernel)
        for name, size in sizes.items():
            self.add_module(name, Branch(channels, size, norm_cfg, conv_backend))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        branches = list(self.children())
        if any(branch.must_be_called() for branch in branches):
            first, *others = (branch(x) for branch in branches)
            return sum(others, first)
        weights = [branch.conv.weight for branch in branches]
        if all(isinstance(branch.bn, nn.Identity) for branch in branches):
            # Deployed by us, or by mmcv's fuse_conv_bn, which leaves a bias in every branch.
            first, *others = (b.conv.bias for b in branches if b.conv.bias is not None)
            return depthwise_conv2d_sum(x, weights, sum(others, first), self.conv_backend)
        if all(is_fixed(branch.bn) for branch in branches) and not is_exporting():
            sources = [s for b in branches for s in fold_sources(b.conv.weight, b.bn)]
            kernels, bias = self.keep(sources, self._fused)
            return depthwise_conv2d_sum(x, kernels, bias, self.conv_backend)
        outputs = depthwise_conv2d_branches(x, weights, self.conv_backend)
        return sum(branch.bn(output) for branch, output in zip(branches, outputs, strict=True))

    def _fused(self) -> tuple[list[Tensor], Tensor]:
        """Kernels and bias (C,) that do what all branches do in eval mode.

        Raises:
            TypeError: See `fold`.
        """
        folded = (fold(branch.conv.weight, branch.bn) for branch in self.children())
        kernels, biases = zip(*folded, strict=True)
        dtype = next(self.children()).conv.weight.dtype
        return [kernel.to(dtype) for kernel in merge_kernels(kernels)], sum(biases).to(dtype)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fuses norms into kernels and the small kernel into the first of the others; outputs in
        eval mode stay.

        Afterwards the strips (or the square) are plain convolutions, and the first of them has the
        bias.
        """
        if self.deployed:
            return
        for branch in self.children():
            make_permanent(branch.conv)
        kernels, bias = self._fused()
        if hasattr(self, 'small'):
            del self.small
        for branch, kernel in zip(self.children(), kernels, strict=True):
            branch.conv.weight.data = kernel
            branch.bn = nn.Identity()
        conv = next(self.children()).conv
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
        self.deployed, self._kept = True, None


@MODELS.register_module()
class SLaK(LargeKernelBackbone):
    """SLaK backbone; SLaK-T, -S and -B are 'tiny', 'small' and 'base'.

    The default width factor of 1.3 spends what 40 % of zeros save.

    Args:
        arch: 'tiny', 'small', 'base' or dict(depths=…, dims=…), `dims` before the width factor.
        small_kernel: Side N of the small kernel and short side of the strips; None only if not
            decomposed.
        decomposed: K×N + N×K strips; False is one K×K kernel (RepLKNet-like; ConvNeXt-like without
            small_kernel).
        kwargs: Those of `LargeKernelBackbone`: in_channels, kernel_sizes, width_factor,
            hidden_channels, out_indices, drop_path_rate, layer_scale_init_value, norm_cfg,
            gap_before_final_norm, frozen_stages, norm_eval, with_cp, conv_backend, init_cfg.

    Raises:
        TypeError: On an unknown argument.
        ValueError: On an unknown arch, or lengths that do not agree.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        small_kernel: int | None = 5,
        decomposed: bool = True,
        **kwargs,
    ) -> None:
        large_kernel = partial(LargeKernelConv2d, small_kernel=small_kernel, decomposed=decomposed)
        super().__init__(large_kernel, arch, **kwargs)
