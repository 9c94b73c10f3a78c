"""Large depthwise kernels: parallel branches with a norm each, fused for deployment."""

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import depthwise_conv2d_branches, depthwise_conv2d_sum, is_exporting


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """A norm of (N, C, H, W).

    Raises:
        ValueError: If it is one of another layout, which would fail in `forward` only.
    """
    norm = build_norm_layer(norm_cfg, channels)[1]
    # Exactly: LN2d, which does take feature maps, is a LayerNorm too.
    if type(norm) in (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm3d):
        raise ValueError(
            f'norm_cfg: expected a norm of (N, C, H, W), such as BN, SyncBN or GN, '
            f'got {norm_cfg["type"]!r}'
        )
    return norm


class Branch(nn.Module):
    """One depthwise kernel and its norm, `conv` + `bn`.

    Args:
        channels: Channels of input and output.
        kernel_size: (height, width), both odd.
        norm_cfg: Config of the norm.
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], norm_cfg: dict) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.conv = nn.Conv2d(
            channels, channels, kernel_size, padding=padding, groups=channels, bias=False
        )
        self.bn = build_norm(norm_cfg, channels)

    def fused(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, kH, kW) and bias (C,), float64, that do what conv and bn do in eval mode.

        Raises:
            TypeError: If the norm is not a batch norm, whose statistics alone are fixed in eval
                mode.
        """
        if not isinstance(self.bn, _BatchNorm):
            raise TypeError(f'only batch norm can be fused into a kernel, got {type(self.bn)}')
        mean, var = self.bn.running_mean.double(), self.bn.running_var.double()
        scale = self.bn.weight.double() / torch.sqrt(var + self.bn.eps)
        kernel = self.conv.weight.double() * scale.view(-1, 1, 1, 1)
        return kernel, self.bn.bias.double() - mean * scale


class LargeKernelConv2d(nn.Module):
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
        norm_cfg = norm_cfg or dict(type='BN')
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
            self.add_module(name, Branch(channels, size, norm_cfg))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        branches = list(self.children())
        if self.deployed:
            weights = [branch.conv.weight for branch in branches]
            bias = branches[0].conv.bias
            return depthwise_conv2d_sum(x, weights, bias, self.conv_backend)
        if self._norms_are_fixed() and not is_exporting():
            weights, biases = zip(*(branch.fused() for branch in branches), strict=True)
            dtype = branches[0].conv.weight.dtype
            weights, bias = [weight.to(dtype) for weight in weights], sum(biases).to(dtype)
            return depthwise_conv2d_sum(x, weights, bias, self.conv_backend)
        weights = [branch.conv.weight for branch in branches]
        outputs = depthwise_conv2d_branches(x, weights, self.conv_backend)
        return sum(branch.bn(output) for branch, output in zip(branches, outputs, strict=True))

    def _norms_are_fixed(self) -> bool:
        """Whether every norm is a batch norm on its running statistics: a scale and a shift."""
        norms = [branch.bn for branch in self.children()]
        return all(
            isinstance(norm, _BatchNorm) and not norm.training and norm.track_running_stats
            for norm in norms
        )

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fuses norms into kernels and the small kernel into the first of the others; outputs in
        eval mode stay.

        Afterwards the strips (or the square) are plain convolutions and the first of them carries
        the whole bias.
        """
        if self.deployed:
            return
        fused = {name: branch.fused() for name, branch in self.named_children()}
        bias = torch.stack([bias for _, bias in fused.values()]).sum(0)
        kernels = {name: kernel for name, (kernel, _) in fused.items()}
        first = next(iter(kernels))
        if 'small' in kernels:
            small = kernels.pop('small')
            kernels[first] = kernels[first] + _pad_to(small, kernels[first].shape[2:])
            del self.small
        for name, kernel in kernels.items():
            branch = getattr(self, name)
            branch.conv.weight.data = kernel.to(branch.conv.weight)
            branch.bn = nn.Identity()
        conv = getattr(self, first).conv
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        self.deployed = True


def _pad_to(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros around a kernel so that it has the given odd size and the same centre."""
    rows, columns = (size[0] - kernel.shape[2]) // 2, (size[1] - kernel.shape[3]) // 2
    return F.pad(kernel, (columns, columns, rows, rows))
