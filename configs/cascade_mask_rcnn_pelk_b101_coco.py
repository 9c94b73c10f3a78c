"""Cascade Mask R-CNN with PeLK-B-101 on COCO, 3x: published AP 53.1 box, 46.1 mask."""

_base_ = ['cascade_mask_rcnn_pelk_b_coco.py']
checkpoint = 'checkpoints/pelk_base_101_in1k.pth'  # of pelk_b_imagenet.py with the kernels below

model = dict(
    backbone=dict(kernel_sizes=(101, 69, 67, 13), center=7, init_cfg=dict(checkpoint=checkpoint))
)
