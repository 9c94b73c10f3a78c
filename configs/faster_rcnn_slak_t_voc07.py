"""Faster R-CNN with SLaK-T on PASCAL VOC 2007, 8 GPUs × 2 images; the published mAP was not found.

Published (arXiv 2207.03620): image sizes, AdamW, 36 epochs, learning rate, weight decay and batch.
The rest is our choice: drop path, steps and warm-up of the COCO recipe, no layer-wise decay, zeros
held; so is the training set, which the paper does not state.
"""

_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '_base_/voc07.py',
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
    roi_head=dict(bbox_head=dict(num_classes=20)),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, end=1000, by_epoch=False),
    dict(type='MultiStepLR', end=max_epochs, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=max_epochs)
custom_hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')]  # keeps the zeros
auto_scale_lr = dict(enable=False, base_batch_size=16)
