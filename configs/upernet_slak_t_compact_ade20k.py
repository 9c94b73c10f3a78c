"""UperNet with a SLaK-T that has lost 40 % of its hidden units, on ADE20K: no published result.

The checkpoint is what `mmslak compact` writes of a pre-training whose hidden units died. It writes
a config beside it, too: put its hidden_channels in the place of these, which are an example, 60 %
of 4 × channels in every block.
"""

_base_ = ['upernet_slak_t_ade20k.py']
checkpoint = 'checkpoints/slak_tiny_compact_in1k.pth'

model = dict(
    backbone=dict(
        hidden_channels=[[298] * 3, [598] * 3, [1198] * 9, [2395] * 3],
        init_cfg=dict(checkpoint=checkpoint),
    )
)
