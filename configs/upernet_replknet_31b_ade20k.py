"""UperNet with RepLKNet-31B on ADE20K under the recipe of SLaK-T: published mIoU 49.9.

The published result is of RepLKNet's own recipe.
mmpretrain's backbone has no get_layer_depth: the learning rate does not decay over layers. It puts
a norm after each output, which the released detectors lack; the classifier's file has only the last
one, so the others start fresh. Its norms are plain BN whatever norm_cfg says, as SLaK's are here.
"""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_3rdparty_in1k_20221118-fd08e268.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.RepLKNet',
        arch='31B',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
custom_hooks = []  # dense
