"""A small SLaK learns single digits at 40 % zeros; the demo's pre-training."""

_base_ = ['../_base_/digits_cls.py', 'mmpretrain::_base_/default_runtime.py']
epochs = 12

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
    ),
    backbone=dict(
        type='mmslak.SLaK',
        arch=dict(depths=[1, 1, 2, 1], dims=[32, 64, 128, 256]),
        width_factor=1.0,
        kernel_sizes=(13, 9, 7, 5),  # the maps of these small images are 16 to 2 pixels wide
        small_kernel=3,
        layer_scale_init_value=1.0,  # 1e-6, made for 300 epochs, would need more than a minute
        out_indices=3,
        gap_before_final_norm=True,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=256,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
    ),
)
# 14 updates in 1440 steps; the head, which UperNet does not take over, stays dense. Maps are so
# small here that random growth would choose positions which no pixel reaches, to stay at zero.
custom_hooks = [
    dict(
        type='mmslak.SparseTrainingHook',
        preset='slak_s',
        exclude=r'^head\.',
        grow='gradient',
    )
]
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=5)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, end=epochs, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=epochs, save_optimizer=False)
)
randomness = dict(seed=0)
