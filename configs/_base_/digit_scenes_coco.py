"""Digit scenes in COCO's folders; data: tools/make_digit_scenes.py."""

data_root = 'data/digit_scenes/coco'
load, pack = dict(type='LoadImageFromFile'), dict(type='PackDetInputs')
load_objects = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
train_pipeline = [load, load_objects, resize, pack]
test_pipeline = [load, resize, load_objects, pack]  # scores are of the original size
dataset = dict(
    type='CocoDataset',
    metainfo=dict(classes=tuple('0123456789')),
    data_root=data_root,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    metric=['bbox', 'segm'],
    ann_file=f'{data_root}/annotations/instances_val2017.json',
)
test_evaluator = val_evaluator
