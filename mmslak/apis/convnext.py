"""ConvNeXt as the authors of SLaK released it, in the names of mmpretrain."""

import re
from collections import OrderedDict
from pathlib import Path

from mmengine.registry import MODELS
from torch import Tensor

from mmslak.checkpoints.files import read_state_dict
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.errors import CheckpointError, first_few, reason
from mmslak.models import SLaK

# What follows `stages.I.J.` in the official code, in SLaK's once norms are folded, and here.
PARTS = {
    'dwconv': 'depthwise_conv',
    'large_kernel.square.conv': 'depthwise_conv',
    'pwconv1': 'pointwise_conv1',
    'pwconv2': 'pointwise_conv2',
}
PART = re.compile(rf'(?<=^stages\.\d\.)(\d+\.)({"|".join(map(re.escape, PARTS))})\.')


def convert_convnext(path: str | Path, arch: str) -> 'OrderedDict[str, Tensor]':
    """Reads a ConvNeXt for ImageNet-1K and gives its tensors mmpretrain's names.

    SLaK's code can build ConvNeXt as a SLaK of 7×7 kernels with a batch norm after each: such norms
    are folded into the kernels.

    Args:
        path: A file in the official names of ConvNeXt, or in those of SLaK.
        arch: 'tiny' or 'small'.

    Returns:
        Tensors `backbone.…` and `head.fc.…`, on the CPU.

    Raises:
        CheckpointError: If the file cannot be read or holds another model.
    """
    state = read_state_dict(path)
    if any('.large_kernel.' in name for name in state):
        state = {**_folded(path, arch), **{k: v for k, v in state.items() if k.startswith('head.')}}
    clean = OrderedDict()
    for name, tensor in state.items():
        name = PART.sub(lambda match: f'{match[1]}{PARTS[match[2]]}.', name)
        name = re.sub(r'^norm\.', 'norm3.', name)
        name = f'head.fc.{name[5:]}' if name.startswith('head.') else f'backbone.{name}'
        clean[name] = tensor.detach().clone().contiguous()
    return _checked(path, arch, clean)


def _folded(path: str | Path, arch: str) -> dict[str, Tensor]:
    """The tensors of a SLaK of 7×7 kernels without its batch norms."""
    model = SLaK(
        arch,
        kernel_sizes=(7, 7, 7, 7),
        small_kernel=None,
        decomposed=False,
        width_factor=1.0,
        out_indices=3,
        gap_before_final_norm=True,
    )
    load_pretrained(model, path)
    model.eval()
    model.switch_to_deploy()
    return model.state_dict()


def _checked(
    path: str | Path, arch: str, state: 'OrderedDict[str, Tensor]'
) -> 'OrderedDict[str, Tensor]':
    """The tensors of the classifier, if all are there; others stand beside the stages alone."""
    classifier = dict(
        type='ImageClassifier',
        backbone=dict(type='ConvNeXt', arch=arch),
        head=dict(type='LinearClsHead', num_classes=1000, in_channels=768),
    )
    model = MODELS.build(dict(_scope_='mmpretrain', **classifier))
    own, stages = model.state_dict(), ('backbone.stages.', 'backbone.downsample_layers.')
    state = OrderedDict((k, v) for k, v in state.items() if k in own or k.startswith(stages))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: no ConvNeXt {arch} for 1000 classes ({reason(error)[:200]}; the file has '
            f'{first_few(state)})'
        ) from error
    return state
