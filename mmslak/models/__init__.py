"""Backbones with very large kernels."""

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.compact import compact_backbone
from mmslak.models.pelk import PeLK
from mmslak.models.peripheral import PeripheralConv2d, sharing_grid
from mmslak.models.slak import LargeKernelConv2d, SLaK

__all__ = [
    'LargeKernelBackbone',
    'LargeKernelConv2d',
    'PeLK',
    'PeripheralConv2d',
    'SLaK',
    'compact_backbone',
    'sharing_grid',
]
