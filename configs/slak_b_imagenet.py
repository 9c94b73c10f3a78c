"""SLaK-B on ImageNet-1K, 300 epochs at batch 4096 (32 GPUs × 128): published top-1 84.0."""

_base_ = ['slak_t_imagenet.py']

model = dict(backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1331))
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4),
    dict(type='mmslak.SparseTrainingHook', preset='slak_b'),
]
