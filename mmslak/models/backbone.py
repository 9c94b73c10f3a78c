"""The base of backbones with large kernels: ConvNeXt's design around a depthwise convolution.

A ConvNet for the 2020s (CVPR 2022, arXiv 2201.03545).
"""

import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import pairwise

import numpy as np
import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_init
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from mmslak.checkpoints.names import rename_for
from mmslak.checkpoints.pretrained import is_pretrained, load_pretrained
from mmslak.checkpoints.schemes import local_file
from mmslak.models.hooks import has_hooks
from mmslak.ops import is_compiling, is_exporting
from mmslak.sparsity.compact import compact_


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LargeKernelBlock(nn.Module):
    """Large kernel, LayerNorm, and an MLP, with layer scale and a residual.

    Args:
        channels: Channels of input and output.
        large_kernel: Module from (N, C, H, W) to the same shape, with `switch_to_deploy()`.
        drop_path_rate: Probability of dropping the whole branch for a sample.
        layer_scale_init_value: Start of the per-channel scale; 0 or less leaves it out.
        with_cp: Recompute the block in the backward pass to save memory.
        hidden_channels: Hidden units of the MLP; None for 4 × channels.
    """

    def __init__(
        self,
        channels: int,
        large_kernel: nn.Module,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        with_cp: bool = False,
        hidden_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.large_kernel = large_kernel
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        hidden_channels = hidden_channels or 4 * channels
        self.pwconv1 = nn.Linear(channels, hidden_channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden_channels, channels)
        self.gamma = None
        if layer_scale_init_value > 0:
            self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor, *shared: Tensor | None) -> Tensor:
        """(N, C, H, W) to (N, C, H, W); `shared` goes to the large kernel beside x."""
        if not self.with_cp or not torch.is_grad_enabled():
            return self._forward(x, *shared)
        if not is_compiling():
            return self._checkpointed(x, *shared)
        if self._is_one_graph():  # it writes statistics once and takes no context_fn
            return checkpoint(self._forward, x, *shared, use_reentrant=False)
        return torch.compiler.disable(self._checkpointed)(x, *shared)

    def _checkpointed(self, x: Tensor, *shared: Tensor | None) -> Tensor:
        contexts = lambda: (nullcontext(), _statistics_kept(self))  # noqa: E731
        return checkpoint(self._forward, x, *shared, use_reentrant=False, context_fn=contexts)

    def _is_one_graph(self) -> bool:
        """Whether torch.compile makes one graph of the block and recomputes it by itself.

        Where the graph breaks in the block, the block is called twice, as without torch.compile. It
        breaks at our operator in torch 2.1, at batch norms with momentum=None, and possibly at
        hooks and layers of users.
        """
        modules = list(self.modules())
        return (
            hasattr(torch.library, 'custom_op')
            and all(getattr(module, 'momentum', 0) is not None for module in modules)
            and not has_hooks(*modules)
            and all(type(m).__module__.startswith(('torch.', 'mmcv.', 'mmslak.')) for m in modules)
        )

    def _forward(self, x: Tensor, *shared: Tensor | None) -> Tensor:
        y = self.large_kernel(x, *shared).permute(0, 2, 3, 1)  # (N, H, W, C), layout of the MLP
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


@contextmanager
def _statistics_kept(module: nn.Module):
    """Keeps norms from counting a batch twice when a checkpointed block is recomputed."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


class LargeKernelBackbone(BaseModule):
    """A stem of stride 4 and four stages of blocks; each model brings its own large kernel.

    `forward` takes (N, in_channels, H, W) and returns a tuple with one feature map (N, C_i, H /
    s_i, W / s_i) for each of out_indices, at strides 4, 8, 16, 32, or (N, C_i) where
    gap_before_final_norm pools first. docs/new-backbone.md shows how to make a backbone of it.

    Args:
        large_kernel: Builds the large kernel of a block (see `LargeKernelBlock`). It is called with
            the channels and the kernel size of the stage and with `norm_cfg=` and `conv_backend=`.
        arch: 'tiny', 'small', 'base' or dict(depths=…, dims=…), `dims` before the width factor.
        in_channels: Channels of the image.
        kernel_sizes: Side K of the large kernel of each stage, odd.
        width_factor: Channels are `int(dim * width_factor)`.
        hidden_channels: Hidden units of the MLPs, a list for each stage with a number for each
            block, as `mmslak compact` prints them; None for 4 × channels everywhere.
        out_indices: Stages whose output is returned; negative ones count from the end. Stages after
            the last of these are not built.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.
        layer_scale_init_value: Start of the layer scale: 1e-6 to pre-train, 1.0 to fine-tune as
            published for SLaK.
        norm_cfg: Norm after each kernel, None for batch norm; fusing for deployment needs a batch
            norm.
        gap_before_final_norm: Pool over H and W before the output norm, for classification heads.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with their
            norms.
        norm_eval: Keep batch norms on their running statistics in training.
        with_cp: Recompute blocks in the backward pass to save memory; running statistics count each
            batch once.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.
        init_cfg: dict(type='Pretrained', checkpoint=…, use_ema=False) takes an official file or any
            of ours, and refuses one that does not fit
            (`mmslak.checkpoints.pretrained.load_pretrained`).

    Attributes:
        out_channels: Channels of each output, in the order of out_indices.
        strides: Pixels of the image per position of each output, likewise.

    Raises:
        TypeError: On an unknown argument; the message names the class that was called.
        ValueError: On an unknown arch, or lengths that do not agree.
    """

    arch_settings = {
        'tiny': dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
        'small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
        'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    }
    stage_type: type[nn.Sequential] = nn.Sequential

    def __init__(
        self,
        large_kernel: Callable[..., nn.Module],
        /,
        arch: str | dict = 'tiny',
        *,
        in_channels: int = 3,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        width_factor: float = 1.3,
        hidden_channels: Sequence[Sequence[int]] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        norm_cfg: dict | None = None,
        gap_before_final_norm: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        conv_backend: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
        **unknown,
    ) -> None:
        if unknown:
            raise TypeError(self._unexpected(next(iter(unknown))))
        super().__init__(init_cfg)
        depths, channels = self._parse_arch(arch, width_factor)
        num_stages = len(depths)
        if isinstance(kernel_sizes, int) or len(kernel_sizes) != num_stages:
            raise ValueError(
                f'kernel_sizes: expected one per stage ({num_stages}), got {kernel_sizes}'
            )
        self.depths, self.channels = depths, channels
        self.out_indices = self._parse_out_indices(out_indices, num_stages)
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(4 * 2**i for i in self.out_indices)
        built = max(self.out_indices) + 1
        self.absent_stages = range(built, num_stages)
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages: expected -1 to {num_stages}, got {frozen_stages}')
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.gap_before_final_norm = gap_before_final_norm
        if hidden_channels is not None:
            self._check_hidden_channels(hidden_channels, built)

        stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], kernel_size=4, stride=4),
            LayerNorm2d(channels[0], eps=1e-6),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(channels[:built]):
            self.downsample_layers.append(
                nn.Sequential(
                    LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, after, kernel_size=2, stride=2)
                )
            )

        drop_path_rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for i in range(built):
            blocks = [
                LargeKernelBlock(
                    channels[i],
                    large_kernel(
                        channels[i], kernel_sizes[i], norm_cfg=norm_cfg, conv_backend=conv_backend
                    ),
                    drop_path_rate=next(drop_path_rates),
                    layer_scale_init_value=layer_scale_init_value,
                    with_cp=with_cp,
                    hidden_channels=hidden_channels and hidden_channels[i][j],
                )
                for j in range(depths[i])
            ]
            self.stages.append(self.stage_type(*blocks))

        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(channels[i], eps=1e-6))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_init(module, std=0.02)
        self._freeze_stages()

    @classmethod
    def _unexpected(cls, name: str) -> str:
        """Message on an argument that neither the class nor its bases take, with the nearest."""
        inits = [base.__init__ for base in cls.__mro__ if '__init__' in vars(base)]
        parameters = [p for init in inits for p in signature(init).parameters.values()]
        known = {p.name for p in parameters if p.default is not p.empty}
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        return f'{cls.__name__}.__init__() got an unexpected keyword argument {name!r}{hint}'

    @classmethod
    def _parse_arch(cls, arch: str | dict, width_factor: float) -> tuple[list[int], list[int]]:
        """Depths and channels of an arch."""
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(
                    f'unknown arch {arch!r}: expected {", ".join(cls.arch_settings)} '
                    'or dict(depths=…, dims=…)'
                )
            arch = cls.arch_settings[arch]
        if set(arch) != {'depths', 'dims'} or len(arch['depths']) != len(arch['dims']):
            raise ValueError(f'arch: expected dict(depths=…, dims=…) of equal length, got {arch}')
        return list(arch['depths']), [int(dim * width_factor) for dim in arch['dims']]

    @staticmethod
    def _parse_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
        """Stages from 0 on, in the order that the caller gave; negative ones are resolved."""
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        if not indices or any(not -num_stages <= i < num_stages for i in indices):
            raise ValueError(
                f'out_indices: expected some of 0 to {num_stages - 1}, got {out_indices}'
            )
        return tuple(i % num_stages for i in indices)

    def _check_hidden_channels(self, given: Sequence[Sequence[int]], built: int) -> None:
        """Raises ValueError unless all blocks of the stages that are built have a number."""
        rows = [row if isinstance(row, Sequence) else () for row in given]
        counts, depths = [len(row) for row in rows], self.depths
        fits = counts == depths[: len(counts)] and len(counts) >= built
        if not fits or any(type(units) is not int or units < 1 for row in rows for units in row):
            raise ValueError(
                f'hidden_channels: expected lists of {", ".join(map(str, depths))} numbers above '
                f'0, one for each block of each stage, got {given}'
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_channels, H, W) to one map for each of out_indices, or to (N, C_i) if pooled.

        Raises:
            ValueError: If a side of the picture is shorter than the stride of the last stage.
        """
        least = 2 ** (len(self.stages) + 1)
        # A traced graph would be bound to what is compared here.
        if not (is_compiling() or is_exporting()) and min(x.shape[2:]) < least:
            raise ValueError(
                f'{type(self).__name__}: expected pictures of at least {least}×{least} pixels, '
                f'got {"×".join(map(str, x.shape[2:]))}'
            )
        outputs = {}
        for i, (downsample, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = stage(downsample(x))
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                if self.gap_before_final_norm:
                    outputs[i] = norm(x.mean([-2, -1], keepdim=True)).flatten(1)
                else:
                    # Heads get NCHW memory, as from any other backbone.
                    outputs[i] = norm(x).contiguous()
        return tuple(outputs[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> 'LargeKernelBackbone':
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.downsample_layers[0]] if self.frozen_stages >= 0 else []
        for i in range(min(self.frozen_stages, len(self.stages))):
            frozen += [self.downsample_layers[i], self.stages[i]]
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Loads init_cfg's 'Pretrained' strictly; leaves every other init_cfg to MMEngine.

        In a list, files are loaded last, as in MMEngine.
        """
        given = self.init_cfg
        cfgs = given if isinstance(given, list) else [given or {}]
        pretrained = [cfg for cfg in cfgs if is_pretrained(cfg)]
        others = [cfg for cfg in cfgs if cfg not in pretrained]
        if others or not pretrained:
            self.init_cfg = others if pretrained else given
            super().init_weights()
            self.init_cfg = given
        for cfg in pretrained:
            options = {k: v for k, v in cfg.items() if k not in ('type', '_scope_', 'checkpoint')}
            file = local_file(cfg.get('checkpoint') or '(no checkpoint given)')
            load_pretrained(self, file, **options)
            self._is_init = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        rename_for(self, state_dict, prefix)
        for name in [name for name in state_dict if self.is_absent(name, prefix)]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def is_absent(self, name: str, prefix: str = '') -> bool:
        """Whether a tensor belongs to a stage of the arch that out_indices leaves out.

        Args:
            name: Name of the tensor in the whole model.
            prefix: What stands before the backbone's own names.
        """
        match = re.match(re.escape(prefix) + r'(?:stages\.|downsample_layers\.|norm)(\d+)\.', name)
        return match is not None and int(match[1]) in self.absent_stages

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Ids as in ConvNeXt's published recipe: blocks of the third stage count in groups of three,
        so there are L = 6 layers in tiny and 12 in small and base; norms of the outputs and heads
        come last.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: What stands before the backbone's own names, such as 'backbone.'.

        Returns:
            (depth, number of depths), 0 ≤ depth < number of depths = L + 2.
        """
        last_layer = 3 + -(-self.depths[2] // 3) if len(self.depths) > 2 else len(self.depths)
        depth = last_layer + 1
        match = re.fullmatch(
            re.escape(prefix) + r'(downsample_layers|stages)\.(\d+)\.(?:(\d+)\.)?.*', param_name
        )
        if match:
            # A parameter that the blocks of a stage share has no number: it counts as the first.
            kind, stage, block = match[1], int(match[2]), int(match[3] or 0)
            if kind == 'downsample_layers':
                depth = 0 if stage == 0 else stage + 1
            else:
                depth = stage + 1 + (block // 3 if stage == 2 else 0)
            if stage >= 3:
                depth = last_layer
        return depth, last_layer + 2

    def switch_to_deploy(self, compact: bool = False) -> None:
        """Fuses every block's branches and norms into plain convolutions; eval outputs stay.

        Args:
            compact: Take dead hidden units out, too; see `mmslak.sparsity.compact_`.
        """
        for stage in self.stages:
            self._fuse_stage(stage)
        if compact:
            compact_(self)

    def _fuse_stage(self, stage: nn.Sequential) -> None:
        for block in stage:
            block.large_kernel.switch_to_deploy()
