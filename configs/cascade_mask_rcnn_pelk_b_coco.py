"""Cascade Mask R-CNN with PeLK-B on COCO, 3x: published AP 52.9 box, 45.9 mask.

Trained as SLaK-T, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['cascade_mask_rcnn_slak_b_coco.py']
checkpoint = 'checkpoints/pelk_base_in1k.pth'  # of pelk_b_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
