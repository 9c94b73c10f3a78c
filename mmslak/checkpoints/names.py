"""Official names of weights, and ours."""

import re
from collections import OrderedDict
from pathlib import Path

from torch import Tensor, nn

from mmslak.checkpoints.files import EXPECTED, read_state_dict
from mmslak.errors import CheckpointError, first_few

# Names inside LargeKernelConv2d in the official code, and ours.
OFFICIAL_BRANCHES = {
    'LoRA1': 'vertical',
    'LoRA2': 'horizontal',
    'small_conv': 'small',
    'lkb_origin': 'square',
}


def rename_official(
    state: dict[str, Tensor], prefix: str = '', final_norm: int | None = None
) -> None:
    """Renames the tensors of an official SLaK file to our names, in place.

    Args:
        state: Tensors by name.
        prefix: Prefix of the backbone's names.
        final_norm: Index of the stage whose output norm takes the classifier's final norm
            (`norm.`). None leaves the final norm as it is.
    """
    branch = re.compile(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.(\w+)\.')
    for name in list(state):
        new = name
        match = branch.match(name)
        if match and match[1] in OFFICIAL_BRANCHES:
            new = name[: match.start(1)] + OFFICIAL_BRANCHES[match[1]] + name[match.end(1) :]
        elif final_norm is not None and name.startswith(f'{prefix}norm.'):
            new = f'{prefix}norm{final_norm}.' + name[len(prefix) + len('norm.') :]
        if new != name:
            state[new] = state.pop(name)


def rename_for(module: nn.Module, state: dict[str, Tensor], prefix: str = '') -> None:
    """Renames official tensors to the names of a backbone, in place.

    If the backbone pools before its last norm, that norm takes the classifier's final norm.

    Args:
        module: The backbone.
        state: Tensors by name.
        prefix: Prefix of the backbone's names.
    """
    last = len(getattr(module, 'depths', ())) - 1
    has_final_norm = getattr(module, 'gap_before_final_norm', False) and last in module.out_indices
    rename_official(state, prefix, last if has_final_norm else None)


def convert(path: str | Path, use_ema: bool = False) -> 'OrderedDict[str, Tensor]':
    """Reads any known SLaK file and gives its tensors clean names: `backbone.…`, `head.fc.…`.

    The classifier's final norm stays `backbone.norm`; a dense predictor has a norm for each stage.
    The heads of UperNet and Cascade Mask R-CNN have the same names in mmseg 0.x and 1.x, and in
    mmdet 2.x and 3.x.

    Raises:
        CheckpointError: See `read_state_dict`; also if the file holds no SLaK.
    """
    state = read_state_dict(path, use_ema)
    if not any(re.match(r'(backbone\.)?stages\.\d+\.\d+\.large_kernel\.', name) for name in state):
        raise CheckpointError(f'{path}: no SLaK in it (it has {first_few(state)}); {EXPECTED}')
    clean = OrderedDict()
    whole_model = any(name.startswith('backbone.') for name in state)
    for name, tensor in state.items():
        if whole_model and name.startswith('ema_'):
            continue  # mmcv's EMAHook keeps a second copy of every weight
        if not whole_model:
            head = re.sub(r'^head\.(?=weight|bias)', 'head.fc.', name)
            name = head if name.startswith('head.') else f'backbone.{name}'
        clean[name] = tensor.detach().clone().contiguous()
    rename_official(clean, 'backbone.')
    return clean
