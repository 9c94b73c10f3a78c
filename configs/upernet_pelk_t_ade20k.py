"""UperNet with PeLK-T on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 48.1.

Trained as SLaK-T, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'checkpoints/pelk_tiny_in1k.pth'  # of pelk_t_imagenet.py; none is published

model = dict(backbone=dict(type='mmslak.PeLK', init_cfg=dict(checkpoint=checkpoint)))
