"""SLaK-T with 7×7 + 5×5 kernels, dense, 120 epochs on ImageNet: no result is published.

Channels are not widened by 1.3, which is what the zeros pay for: our choice.
"""

_base_ = ['../slak_t_imagenet_120e.py']

model = dict(
    backbone=dict(kernel_sizes=(7, 7, 7, 7), decomposed=False, width_factor=1.0),
    head=dict(in_channels=768),
)
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
