"""SLaK-T with 61×5 + 5×61 + 5×5 kernels, sparse, 120 epochs on ImageNet: published top-1 81.5."""

_base_ = ['../slak_t_imagenet_120e.py']

model = dict(backbone=dict(kernel_sizes=(61, 59, 57, 13)))
