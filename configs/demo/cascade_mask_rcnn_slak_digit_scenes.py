"""Cascade Mask R-CNN on digit scenes, from the sparse backbone of slak_digits.py, zeros held."""

_base_ = [
    '../_base_/cascade_mask_rcnn_giou.py',
    '../_base_/digit_scenes_detector.py',
    '../_base_/digit_scenes_coco.py',
]
stages = _base_.model.train_cfg.rcnn
small = dict(in_channels=64, conv_out_channels=64, num_classes=10)
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
        bbox_head=[dict(head, fc_out_channels=256, **small) for head in _base_.box_heads],
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, **small),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=_base_.proposals,
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32)) for stage in stages],
    ),
    test_cfg=dict(rpn=_base_.proposals),
)
