"""UperNet with a dense SLaK-T on ADE20K, 80k iterations at 4 GPUs × 8 images.

The schedule of the paper's ablations, from 120-epoch checkpoints: dense 46.1 mIoU (sparse 46.5).
Batch size and warm-up are those of the official repository's 80k config.
"""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'checkpoints/slak_tiny_120e_in1k.pth'

model = dict(backbone=dict(drop_path_rate=0.1, init_cfg=dict(checkpoint=checkpoint)))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=800, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=800, end=80000, by_epoch=False),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
custom_hooks = []
train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=32)
