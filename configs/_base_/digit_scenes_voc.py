"""Digit scenes in PASCAL VOC's folders; data: tools/make_digit_scenes.py."""

data_root = 'data/digit_scenes/voc/VOCdevkit'
load, pack = dict(type='LoadImageFromFile'), dict(type='PackDetInputs')
load_objects = dict(type='LoadAnnotations', with_bbox=True)
resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
train_pipeline = [load, load_objects, resize, pack]
test_pipeline = [load, resize, load_objects, pack]  # scores are of the original size
dataset = dict(
    type='VOCDataset',
    metainfo=dict(classes=tuple('0123456789')),
    data_root=data_root,
    data_prefix=dict(sub_data_root='VOC2007/'),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        ann_file='VOC2007/ImageSets/Main/trainval.txt', pipeline=train_pipeline, **dataset
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='VOC2007/ImageSets/Main/test.txt',
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='11points')
test_evaluator = val_evaluator
