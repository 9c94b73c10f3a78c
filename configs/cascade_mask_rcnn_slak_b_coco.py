"""Cascade Mask R-CNN with SLaK-B on COCO, 3x: published AP 52.5 box, 45.5 mask (in PeLK's paper).

The recipe behind these numbers is not stated. Our choice: that of SLaK-T, drop path included.
"""

_base_ = ['cascade_mask_rcnn_slak_t_coco.py']
checkpoint = 'checkpoints/slak_base_in1k.pth'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[166, 332, 665, 1331]),
)
