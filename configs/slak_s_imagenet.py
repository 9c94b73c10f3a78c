"""SLaK-S on ImageNet-1K, 300 epochs at batch 4096 (32 GPUs × 128): published top-1 83.8."""

_base_ = ['slak_t_imagenet.py']

model = dict(backbone=dict(arch='small', drop_path_rate=0.4))
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4),
    dict(type='mmslak.SparseTrainingHook', preset='slak_s'),
]
