"""Backbones of the libraries with fewer hidden units."""

from collections.abc import Sequence

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmslak.registry import MODELS
from mmslak.sparsity.compact import narrow_


@MODELS.register_module('CompactBackbone')
def compact_backbone(backbone: dict, hidden_channels: Sequence[int]) -> nn.Module:
    """Builds a backbone of mmpretrain, mmseg or mmdet whose hidden layers are narrower.

    It is for files that `mmslak compact` has written; SLaK and PeLK take `hidden_channels`
    themselves. The result is the library's backbone and nothing around it, so that the names of its
    tensors stay. Settings of the backbone are in `backbone`: what sets `model.backbone.KEY` in a
    config, such as `--stage` of `mmslak erf`, does not reach them.

    Args:
        backbone: Config of the backbone, such as `dict(type='mmpretrain.ConvNeXt', arch='tiny')`.
        hidden_channels: Hidden units of each hidden layer, in the order of
            `mmslak.sparsity.find_hidden_layers`.

    Raises:
        ValueError: If the backbone has no such layers, or the numbers do not fit them.
    """
    model = MMENGINE_MODELS.build(backbone)
    narrow_(model, hidden_channels)
    return model
