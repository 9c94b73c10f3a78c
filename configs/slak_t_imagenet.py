"""SLaK-T on ImageNet-1K, 300 epochs at batch 4096 (32 GPUs × 128): published top-1 82.5.

Source: SLaK (arXiv 2207.03620), augmentation as ConvNeXt. The least learning rate is mmpretrain's.
"""

_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmslak.SLaK',
        arch='tiny',
        drop_path_rate=0.1,
        out_indices=3,
        gap_before_final_norm=True,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=998,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4),
    dict(type='mmslak.SparseTrainingHook', preset='slak_t'),
]
train_dataloader = dict(batch_size=128)
auto_scale_lr = dict(enable=False, base_batch_size=4096)
