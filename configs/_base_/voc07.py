"""PASCAL VOC: trained on 2007 trainval, each image once an epoch, tested on 2007 test.

Shorter sides of 480 to 800 in training and 800 in testing, longer ones of at most 1333. Small boxes
are learnt, as in MMDetection 2, with which the papers trained; MMDetection 3's base ignores those
below 32 pixels.
"""

_base_ = ['mmdet::_base_/datasets/voc0712.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomChoiceResize',
        scales=[(side, 1333) for side in range(480, 801, 32)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (1333, 800)
train_set = dict(
    _base_.train_dataloader.dataset.dataset.datasets[0],
    pipeline=train_pipeline,
    filter_cfg=dict(filter_empty_gt=True, min_size=32),  # of pictures
)
train_dataloader = dict(dataset=dict(_delete_=True, **train_set))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
