"""What the demo's two detectors share: parts of their models and the schedule.

Sizes are for scenes resized to 160 pixels, with digits of 40 to 52.
"""

_base_ = ['mmdet::_base_/default_runtime.py']
checkpoint = 'work_dirs/demo/slak_digits/epoch_12.pth'
max_epochs = 2
strides = [4, 8, 16, 32]
backbone = dict(
    type='mmslak.SLaK',
    arch=dict(depths=[1, 1, 2, 1], dims=[32, 64, 128, 256]),
    width_factor=1.0,
    kernel_sizes=(13, 9, 7, 5),
    small_kernel=3,
    layer_scale_init_value=1.0,
)
neck = dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4)
rpn_head = dict(
    in_channels=64,
    feat_channels=64,
    anchor_generator=dict(scales=[6], strides=strides),  # 48 pixels on the second level
)
proposals = dict(nms_pre=200, max_per_img=50)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=0, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=max_epochs, save_optimizer=False)
)
custom_hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')]  # keeps the zeros
randomness = dict(seed=0)
