"""Backbones by name, for those who want a torch module and no config."""

import difflib
from pathlib import Path

from torch import nn

from mmslak.apis.model import init_weights
from mmslak.apis.weights import get_released
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.checkpoints.released import FOLDER, RELEASED
from mmslak.errors import UserError
from mmslak.models import PeLK, SLaK

BACKBONES = {
    f'{kind.__name__.lower()}_{arch}': (kind, arch)
    for kind in (SLaK, PeLK)
    for arch in kind.arch_settings
}


def get_backbone(name: str, pretrained: bool | str | Path = False, **kwargs) -> nn.Module:
    """Builds a backbone.

    Called with (N, 3, H, W) it returns a tuple of feature maps, one for each of `out_indices`.
    `backbone.out_channels` and `backbone.strides` are tuples with the channels and the stride of
    each map.

    Args:
        name: 'slak_tiny', 'slak_small', 'slak_base', 'pelk_tiny', 'pelk_small' or 'pelk_base'.
        pretrained: True takes the weights that the authors of SLaK released for ImageNet-1K. They
            are those that `mmslak get-checkpoint` has put into `checkpoints/`, or are downloaded
            once into `checkpoints` of torch hub's folder (`torch.hub.get_dir()`). A path takes a
            file: an official one, a checkpoint of a run, or one of ours. False leaves random
            weights.
        kwargs: Arguments of `mmslak.models.SLaK` or `mmslak.models.PeLK`, for example
            `out_indices=(1, 2, 3)`.

    Returns:
        The backbone in training mode, as torch builds modules.

    Raises:
        UserError: On an unknown name, and if no weights were released for it.
        DownloadError: If they cannot be downloaded.
        CheckpointError: If the file cannot be read, or its weights do not fit.

    Examples:
        >>> import torch
        >>> from mmslak.apis import get_backbone
        >>> backbone = get_backbone('slak_tiny', pretrained=True).eval()
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 224, 224))]
        [(1, 124, 56, 56), (1, 249, 28, 28), (1, 499, 14, 14), (1, 998, 7, 7)]
    """
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0)[0]
        raise UserError(
            f'no backbone {name!r}; the nearest is {nearest!r}, and all are {", ".join(BACKBONES)}'
        )
    kind, arch = BACKBONES[name]
    if pretrained is True:
        if name not in RELEASED:
            raise UserError(
                f'{name}: no weights were released for {kind.__name__}; pretrained=PATH takes a '
                'file of your own'
            )
        there = Path(FOLDER, RELEASED[name].file)
        pretrained = there if there.is_file() else get_released(name)
    backbone = kind(arch=arch, **kwargs)
    if pretrained:
        load_pretrained(backbone, pretrained)
    else:
        init_weights(backbone)
    return backbone
