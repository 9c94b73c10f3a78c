"""UperNet with SLaK-S on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 49.4."""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'checkpoints/slak_small_in1k.pth'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)))
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
