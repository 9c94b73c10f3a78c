"""SLaK-T with 61×61 + 5×5 kernels, sparse, 120 epochs on ImageNet: no result is published."""

_base_ = ['../slak_t_imagenet_120e.py']

model = dict(backbone=dict(kernel_sizes=(61, 59, 57, 13), decomposed=False))
