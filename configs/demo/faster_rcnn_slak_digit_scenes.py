"""Faster R-CNN on digit scenes, from the sparse backbone of slak_digits.py with its zeros held."""

_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/digit_scenes_detector.py',
    '../_base_/digit_scenes_voc.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.checkpoint),
        **_base_.backbone,
    ),
    neck=_base_.neck,
    rpn_head=_base_.rpn_head,
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=_base_.proposals,
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=_base_.proposals),
)
