"""UperNet on digit scenes, from the backbone that configs/demo/slak_digits.py trained."""

_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
checkpoint = 'work_dirs/demo/slak_digits/epoch_12.pth'
data_root = 'data/digit_scenes/ade'
iterations = 300
norm_cfg = dict(type='BN', requires_grad=True)
# Nine pixels of ten are background; unweighted, nothing else is learnt for hundreds of steps.
loss = dict(type='CrossEntropyLoss', class_weight=[0.1, *[1.0] * 10])

model = dict(
    data_preprocessor=dict(size=(160, 160)),
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

# ADE20K's folders and labels. ADE20KDataset itself takes only subsets of ADE20K's class names,
# so the class that it derives from reads them, with its one deviating default.
classes = ('background', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
palette = [[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [67, 99, 216], [245, 130, 49]]
palette += [[145, 30, 180], [66, 212, 244], [240, 50, 230], [191, 239, 69], [250, 190, 212]]
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=True,
    data_root=data_root,
    pipeline=pipeline,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

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
