"""UperNet with Swin-T on ADE20K under the recipe of SLaK-T: published mIoU 44.5.

The published result is of Swin's own recipe.
Stage-wise decay takes Swin's stages as SLaK's. Unlike in Swin's recipe, the tables of relative
positions get weight decay.
"""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/swin_tiny_patch4_window7_224-160bb0a5.pth'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch='tiny',
        img_size=224,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.4,
        pad_small_map=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
custom_hooks = []  # dense
