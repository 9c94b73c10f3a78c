"""The demo's pre-training with hidden units that go: 40 % of them in the first three quarters."""

_base_ = ['slak_digits.py']

custom_hooks = [dict(_base_.custom_hooks[0], structure=dict(type='neuron', share=0.4, until=0.75))]
