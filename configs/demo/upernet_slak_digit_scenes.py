"""UperNet on digit scenes, from the sparse backbone of slak_digits.py with its zeros held."""

_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/digit_scenes_seg.py',
]
checkpoint = 'work_dirs/demo/slak_digits/epoch_12.pth'
iterations = 400
norm_cfg = dict(type='BN', requires_grad=True)
# Nine pixels of ten are background; unweighted, nothing else is learnt for hundreds of steps.
loss = dict(type='CrossEntropyLoss', class_weight=[0.1, *[1.0] * 10])

model = dict(
    # Padding is background: class weights and pixels of no class do not go together in mmseg 1.2.
    # Tested as trained, on maps that 32 divides; what is left over shifts the coarser ones.
    data_preprocessor=dict(size=(160, 160), seg_pad_val=0, test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type='mmslak.SLaK',
        arch=dict(depths=[1, 1, 2, 1], dims=[32, 64, 128, 256]),
        width_factor=1.0,
        kernel_sizes=(13, 9, 7, 5),
        small_kernel=3,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        pool_scales=(1, 2),
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=loss,
    ),
    auxiliary_head=dict(
        in_channels=128, channels=32, num_classes=11, norm_cfg=norm_cfg, loss_decode=loss
    ),
)
custom_hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=30, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=30, end=iterations, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=iterations, save_optimizer=False
    ),
)
randomness = dict(seed=0)
