"""Backbones with very large kernels, and distillation."""

from mmslak.models.backbone import LargeKernelBackbone
from mmslak.models.compact import compact_backbone
from mmslak.models.distillation import distilled_classifier, distilled_segmentor
from mmslak.models.distillation_losses import CWD, KD, NKD
from mmslak.models.pelk import PeLK
from mmslak.models.peripheral import PeripheralConv2d, sharing_grid
from mmslak.models.slak import LargeKernelConv2d, SLaK

__all__ = [
    'CWD',
    'KD',
    'NKD',
    'LargeKernelBackbone',
    'LargeKernelConv2d',
    'PeLK',
    'PeripheralConv2d',
    'SLaK',
    'compact_backbone',
    'distilled_classifier',
    'distilled_segmentor',
    'sharing_grid',
]
