"""SLaK-T with 31×31 + 5×5 kernels, sparse, 120 epochs on ImageNet: no result is published."""

_base_ = ['../slak_t_imagenet_120e.py']

model = dict(backbone=dict(kernel_sizes=(31, 29, 27, 13), decomposed=False))
