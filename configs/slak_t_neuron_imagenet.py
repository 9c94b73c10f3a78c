"""SLaK-T on ImageNet-1K whose hidden units go while it trains: 40 % of them after 225 epochs.

Our recipe, without published results: SLaK-T's, with the structure of Chase (NeurIPS 2023, arXiv
2305.19454). `mmslak compact` then takes the units out; upernet_slak_t_compact_ade20k.py goes on.
"""

_base_ = ['slak_t_imagenet.py']

custom_hooks = [
    _base_.custom_hooks[0],
    dict(
        _base_.custom_hooks[1],
        structure=dict(type='neuron', share=0.4, until=0.75, score='umm'),
    ),
]
