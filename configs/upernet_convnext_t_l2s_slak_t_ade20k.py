"""UperNet with ConvNeXt-T learns from UperNet with SLaK-T on ADE20K: no published result.

The recipe of upernet_convnext_t_ade20k.py, which also tests the result, with channel-wise
distillation of the logits (arXiv 2011.13256) beside its losses: our combination.
"""

_base_ = ['upernet_convnext_t_ade20k.py']
teacher_checkpoint = 'checkpoints/upernet_slak_tiny_ade20k.pth'

model = dict(
    _delete_=True,
    type='mmslak.DistilledSegmentor',
    student=_base_.model,
    teacher='mmslak::upernet_slak_t_ade20k',
    teacher_checkpoint=teacher_checkpoint,
    loss=dict(type='mmslak.CWD', temperature=4.0, weight=3.0),
)
