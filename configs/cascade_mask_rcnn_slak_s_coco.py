"""Cascade Mask R-CNN with SLaK-S on COCO, 3x; no result is published.

Our choice: the recipe of SLaK-T, drop path included.
"""

_base_ = ['cascade_mask_rcnn_slak_t_coco.py']
checkpoint = 'checkpoints/slak_small_in1k.pth'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=checkpoint)))
