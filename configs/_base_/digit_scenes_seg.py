"""Digit scenes in ADE20K's folders and labels; data: tools/make_digit_scenes.py.

ADE20KDataset itself takes only subsets of ADE20K's class names, so the class that it derives from
reads them, with its one deviating default.
"""

data_root = 'data/digit_scenes/ade'
classes = ('background', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
palette = [[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [67, 99, 216], [245, 130, 49]]
palette += [[145, 30, 180], [66, 212, 244], [240, 50, 230], [191, 239, 69], [250, 190, 212]]
load, pack = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
load_labels = dict(type='LoadAnnotations')
resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
train_pipeline = [load, load_labels, resize, pack]
test_pipeline = [load, resize, load_labels, pack]  # scores are of the original size
dataset = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=True,
    data_root=data_root,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,  # pictures differ in size
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
