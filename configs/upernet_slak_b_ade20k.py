"""UperNet with SLaK-B on ADE20K, 160k iterations at 4 GPUs × 4 images: published mIoU 50.0."""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'checkpoints/slak_base_in1k.pth'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.4, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[166, 332, 665, 1331]),
    auxiliary_head=dict(in_channels=665),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
