"""UperNet with 7×7 kernels, from scratch, learns digit scenes from the demo's UperNet with SLaK.

`make demo` trains the teacher. 400 steps as there, without its pre-training.
"""

_base_ = ['upernet_slak_digit_scenes.py']
teacher_checkpoint = 'work_dirs/demo/upernet_pretrained/iter_400.pth'
backbone = dict(
    type='mmpretrain.ConvNeXt',
    arch=dict(depths=[1, 1, 2, 1], channels=[32, 64, 128, 256]),
    out_indices=(0, 1, 2, 3),
    layer_scale_init_value=1.0,
    gap_before_final_norm=False,
)

model = dict(
    _delete_=True,
    type='mmslak.DistilledSegmentor',
    student=dict(_base_.model, backbone=backbone),
    teacher='mmslak::demo/upernet_slak_digit_scenes',
    teacher_checkpoint=teacher_checkpoint,
    loss=dict(type='mmslak.CWD', temperature=4.0, weight=3.0),
)
custom_hooks = []  # dense
