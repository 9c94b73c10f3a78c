"""Backbones with very large kernels."""

from mmslak.models.large_kernel import LargeKernelConv2d, SLaK
from mmslak.models.pelk import PeLK
from mmslak.models.peripheral import PeripheralConv2d, sharing_grid

__all__ = ['LargeKernelConv2d', 'PeLK', 'PeripheralConv2d', 'SLaK', 'sharing_grid']
