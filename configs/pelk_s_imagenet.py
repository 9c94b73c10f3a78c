"""PeLK-S on ImageNet-1K, 300 epochs at batch 4096 (32 GPUs × 128): published top-1 83.9.

Trained as SLaK-S, as PeLK's paper (arXiv 2403.07589) does; drop path is our choice.
"""

_base_ = ['slak_s_imagenet.py']

model = dict(backbone=dict(type='mmslak.PeLK'))
