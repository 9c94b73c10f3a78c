"""Cascade Mask R-CNN with SLaK-T on COCO, 1x: published AP 48.4 box, 41.8 mask.

From a checkpoint of 120 epochs, as published (arXiv 2207.03620).
"""

_base_ = ['cascade_mask_rcnn_slak_t_coco.py']
checkpoint = 'checkpoints/slak_tiny_120e_in1k.pth'
max_epochs = 12

model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, end=1000, by_epoch=False),
    dict(type='MultiStepLR', end=max_epochs, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=max_epochs)
