"""Operators on plain tensors; nothing here knows of MMEngine."""

from mmslak.ops.accelerate import accelerate
from mmslak.ops.choice import choices, restore_choices, spent, tuning, tuning_mode
from mmslak.ops.depthwise import (
    BACKENDS,
    DepthwiseConv2d,
    depthwise_conv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_sum,
    is_compiling,
    is_exporting,
    is_transformed,
)
from mmslak.ops.native import merge_kernels

__all__ = [
    'BACKENDS',
    'DepthwiseConv2d',
    'accelerate',
    'choices',
    'depthwise_conv2d',
    'depthwise_conv2d_branches',
    'depthwise_conv2d_sum',
    'is_compiling',
    'is_exporting',
    'is_transformed',
    'merge_kernels',
    'restore_choices',
    'spent',
    'tuning',
    'tuning_mode',
]
