"""SLaK: a ConvNeXt with 51×51 kernels, each split into two strips and a small kernel.

More ConvNets in the 2020s: Scaling up Kernels Beyond 51×51 using Sparsity (ICLR 2023, arXiv
2207.03620).
"""

from collections.abc import Sequence

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.large_kernel import LargeKernelConv2d
from mmslak.registry import MODELS


@MODELS.register_module()
class SLaK(LargeKernelBackbone):
    """SLaK backbone; SLaK-T, -S and -B are 'tiny', 'small' and 'base'.

    `forward` takes (N, in_channels, H, W) and returns a tuple with one feature map (N, C_i, H /
    s_i, W / s_i) for each of out_indices, at strides 4, 8, 16, 32, or (N, C_i) where
    gap_before_final_norm pools first.

    Args:
        arch: 'tiny', 'small', 'base' or dict(depths=…, dims=…), `dims` before the width factor.
        in_channels: Channels of the image.
        kernel_sizes: Side K of the large kernel of each stage, odd.
        small_kernel: Side N of the small kernel and short side of the strips; None only if not
            decomposed.
        decomposed: K×N + N×K strips; False is one K×K kernel (RepLKNet-like; ConvNeXt-like without
            small_kernel).
        width_factor: Channels are `int(dim * width_factor)`; SLaK spends what sparsity saves on
            width 1.3.
        out_indices: Stages whose output is returned; negative ones count from the end. Stages after
            the last of these are not built.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.
        layer_scale_init_value: Start of the layer scale: 1e-6 to pre-train, 1.0 to fine-tune as
            published.
        norm_cfg: Norm after each kernel branch; fusing for deployment needs a batch norm.
        gap_before_final_norm: Pool over H and W before the output norm, for classification heads.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with their
            norms.
        norm_eval: Keep batch norms on their running statistics in training.
        with_cp: Recompute blocks in the backward pass to save memory; running statistics count each
            batch once.
        conv_backend: Backend of `mmslak.ops.depthwise_conv2d`.
        init_cfg: dict(type='Pretrained', checkpoint=…, use_ema=False) takes the official file or
            any of ours and refuses one that does not fit
            (`mmslak.checkpoints.pretrained.load_pretrained`).

    Raises:
        ValueError: On an unknown arch, or lengths that do not agree.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int | None = 5,
        decomposed: bool = True,
        width_factor: float = 1.3,
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
    ) -> None:
        def large_kernel(channels: int, kernel_size: int) -> LargeKernelConv2d:
            return LargeKernelConv2d(
                channels, kernel_size, small_kernel, decomposed, norm_cfg, conv_backend
            )

        super().__init__(
            large_kernel,
            arch=arch,
            kernel_sizes=kernel_sizes,
            in_channels=in_channels,
            width_factor=width_factor,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            layer_scale_init_value=layer_scale_init_value,
            gap_before_final_norm=gap_before_final_norm,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
