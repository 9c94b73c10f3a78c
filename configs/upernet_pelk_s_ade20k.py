"""UperNet with PeLK-S on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 49.7.

Trained as SLaK-S, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['upernet_slak_s_ade20k.py']
checkpoint = 'checkpoints/pelk_small_in1k.pth'  # of pelk_s_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
