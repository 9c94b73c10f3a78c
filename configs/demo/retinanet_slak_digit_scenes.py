"""RetinaNet on digit scenes, from the sparse backbone of slak_digits.py with its zeros held."""

_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/digit_scenes_detector.py',
    '../_base_/digit_scenes_coco.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint),
        **_base_.backbone,
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, start_level=0, num_outs=4),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        num_classes=10,
        anchor_generator=dict(strides=[8, 16, 32, 64]),
    ),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
