"""PeLK-B at 384×384 on ImageNet-1K, 30 epochs at batch 512 (16 GPUs × 32): no published result.

PeLK's paper (arXiv 2403.07589) gives no recipe for 384×384; this one is SLaK-B's here.
"""

_base_ = ['slak_b_imagenet_384.py']
checkpoint = 'checkpoints/pelk_base_in1k.pth'  # of pelk_b_imagenet.py

model = dict(
    backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)),
    head=dict(init_cfg=dict(checkpoint=checkpoint)),
)
