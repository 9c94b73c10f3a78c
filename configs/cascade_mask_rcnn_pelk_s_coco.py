"""Cascade Mask R-CNN with PeLK-S on COCO, 3x: published AP 52.2 box, 45.3 mask.

Trained as SLaK-T, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['cascade_mask_rcnn_slak_s_coco.py']
checkpoint = 'checkpoints/pelk_small_in1k.pth'  # of pelk_s_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
