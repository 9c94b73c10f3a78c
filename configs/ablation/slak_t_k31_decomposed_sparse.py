"""SLaK-T with 31×5 + 5×31 + 5×5 kernels, sparse, 120 epochs on ImageNet: published top-1 81.5."""

_base_ = ['../slak_t_imagenet_120e.py']

model = dict(backbone=dict(kernel_sizes=(31, 29, 27, 13)))
