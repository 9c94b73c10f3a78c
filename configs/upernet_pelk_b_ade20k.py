"""UperNet with PeLK-B on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 50.4.

Trained as SLaK-B, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['upernet_slak_b_ade20k.py']
checkpoint = 'checkpoints/pelk_base_in1k.pth'  # of pelk_b_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
