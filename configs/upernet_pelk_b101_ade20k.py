"""UperNet with PeLK-B-101 on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 50.6."""

_base_ = ['upernet_pelk_b_ade20k.py']
checkpoint = 'checkpoints/pelk_base_101_in1k.pth'  # of pelk_b_imagenet.py with the kernels below

model = dict(
    backbone=dict(kernel_sizes=(101, 69, 67, 13), center=7, init_cfg=dict(checkpoint=checkpoint))
)
