"""ConvNeXt-S learns from SLaK-S on ImageNet-1K, 300 epochs at batch 4096: published top-1 84.3.

4 GPUs × 64 images × 16 accumulated; otherwise as ConvNeXt-T, drop path included.
"""

_base_ = ['convnext_t_l2s_slak_t_imagenet.py']
checkpoint = 'checkpoints/slak_small_in1k.pth'

model = dict(
    student=dict(backbone=dict(arch='small', drop_path_rate=0.1)),
    teacher='mmslak::slak_s_imagenet',
    teacher_checkpoint=checkpoint,
)
optim_wrapper = dict(accumulative_counts=16)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, interval=16)]
