"""Digit scenes in PASCAL VOC's folders; data: tools/make_digit_scenes.py."""

data_root = 'data/digit_scenes/voc/VOCdevkit'
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='PackDetInputs'),
]
dataset = dict(
    type='VOCDataset',
    metainfo=dict(classes=tuple('0123456789')),
    data_root=data_root,
    data_prefix=dict(sub_data_root='VOC2007/'),
    pipeline=pipeline,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='VOC2007/ImageSets/Main/trainval.txt', **dataset),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='VOC2007/ImageSets/Main/test.txt', test_mode=True, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='11points')
test_evaluator = val_evaluator
