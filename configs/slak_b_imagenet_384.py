"""SLaK-B at 384×384 on ImageNet-1K, 30 epochs at batch 512 (16 GPUs × 32): published top-1 85.5.

SLaK (arXiv 2207.03620) publishes the result without a recipe. This one is ConvNeXt-B's (TRAINING.md
of facebookresearch/ConvNeXt). That scales the head of a new model by 0.001, but then loads the
checkpoint's head over it, so that the head is the checkpoint's here. That the zeros are held is our
choice. Pictures are tested without a crop, as there.
"""

_base_ = ['slak_b_imagenet.py']
checkpoint = 'checkpoints/slak_base_in1k.pth'
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384
resize = dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic')
test_pipeline = [_base_.test_pipeline[0], resize, _base_.test_pipeline[-1]]

model = dict(
    backbone=dict(
        drop_path_rate=0.8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint, prefix='head.'),
    ),
    train_cfg=None,  # neither Mixup nor CutMix
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-5, weight_decay=1e-8),
    constructor='mmslak.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.7),
)
# To 1e-6 in the head; in the layers below it, too, learning rates keep their proportion.
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, end=30, convert_to_iter_based=True)
]
custom_hooks = [dict(type='mmslak.SparseTrainingHook', preset='finetune')]  # keeps the zeros
train_cfg = dict(max_epochs=30)
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
auto_scale_lr = dict(enable=False, base_batch_size=512)
