"""Backbones with very large kernels."""

from .large_kernel import LargeKernelConv2d
from .slak import SLaK

__all__ = ['LargeKernelConv2d', 'SLaK']
