"""PeLK-B-101 at 384×384 on ImageNet-1K, 30 epochs at batch 512 (16 × 32): published top-1 85.8.

PeLK's paper (arXiv 2403.07589) gives the result without a recipe; this one is SLaK-B's here.
"""

_base_ = ['pelk_b_imagenet_384.py']
checkpoint = 'checkpoints/pelk_base_101_in1k.pth'  # of pelk_b_imagenet.py with the kernels below

model = dict(
    backbone=dict(kernel_sizes=(101, 69, 67, 13), center=7, init_cfg=dict(checkpoint=checkpoint)),
    head=dict(init_cfg=dict(checkpoint=checkpoint)),
)
