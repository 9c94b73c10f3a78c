"""Cascade Mask R-CNN with PeLK-T on COCO, 3x: published AP 51.4 box, 44.6 mask.

Trained as SLaK-T, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['cascade_mask_rcnn_slak_t_coco.py']
checkpoint = 'checkpoints/pelk_tiny_in1k.pth'  # of pelk_t_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
