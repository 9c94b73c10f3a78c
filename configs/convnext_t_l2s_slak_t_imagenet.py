"""ConvNeXt-T learns from SLaK-T on ImageNet-1K, 300 epochs at batch 2048: published top-1 83.1.

4 GPUs × 64 images × 8 accumulated. Source: Are Large Kernels Better Teachers than Transformers for
ConvNets? (ICML 2023, arXiv 2305.19412) and the README of VITA-Group/SLaK, whose student has a batch
norm after each 7×7 kernel, which folds into it; ours is ConvNeXt-T itself. Augmentation and the
least learning rate are those of mmpretrain's ConvNeXt-T, the config that tests the result.
"""

_base_ = ['mmpretrain::convnext/convnext-tiny_32xb128_in1k.py']
checkpoint = 'checkpoints/slak_tiny_in1k.pth'

model = dict(
    _delete_=True,
    type='mmslak.DistilledClassifier',
    student=_base_.model,
    teacher='mmslak::slak_t_imagenet',
    teacher_checkpoint=checkpoint,
    loss=dict(type='mmslak.NKD', temperature=1.0, alpha=1.0),
)
optim_wrapper = dict(optimizer=dict(lr=4e-3), accumulative_counts=8)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, interval=8)]  # once for each step
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(enable=False, base_batch_size=256)  # without accumulation
