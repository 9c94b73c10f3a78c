"""Cascade Mask R-CNN with SLaK-T on COCO, 3x: published AP 51.3 box, 44.3 mask.

8 GPUs × 2 images. Source: SLaK (arXiv 2207.03620); warm-up and layer scale as mmdet's ConvNeXt.
"""

_base_ = [
    '_base_/cascade_mask_rcnn_giou.py',
    '_base_/coco_instance_ms_crop.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
checkpoint = 'checkpoints/slak_tiny_in1k.pth'
max_epochs = 36

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmslak.SLaK',
        arch='tiny',
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[124, 249, 499, 998]),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmslak.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.7),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, end=1000, by_epoch=False),
    dict(type='MultiStepLR', end=max_epochs, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=max_epochs)
custom_hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')]  # keeps the zeros
auto_scale_lr = dict(enable=False, base_batch_size=16)
