"""Backbones with very large kernels."""

from .large_kernel import LargeKernelConv2d
from .pelk import PeLK
from .peripheral import PeripheralConv2d, sharing_grid
from .slak import SLaK

__all__ = ['LargeKernelConv2d', 'PeLK', 'PeripheralConv2d', 'SLaK', 'sharing_grid']
