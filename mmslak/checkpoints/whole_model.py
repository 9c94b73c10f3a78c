"""Weights of a whole model: all of them, or one clear error."""

import torch
from torch import nn

from mmslak.checkpoints.files import read_state_dict
from mmslak.checkpoints.names import convert, rename_for
from mmslak.checkpoints.pretrained import hidden_channels_hint
from mmslak.errors import UserError, own_errors_only


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Loads all weights of a model; tensors of official SLaK files get our names.

    Raises:
        UserError: If weights are missing or have another shape.
        CheckpointError: If the file cannot be read.
    """
    state = read_state_dict(checkpoint)
    if hasattr(model, 'backbone') and not any(name.startswith('backbone.') for name in state):
        state = convert(checkpoint)
    check_fit(model, checkpoint, state)
    model.load_state_dict(state, strict=False)


@own_errors_only
def check_fit(model: nn.Module, checkpoint: str, state: dict) -> None:
    """Checks that a checkpoint has every weight of the model, where MMEngine merely warns.

    Args:
        model: The model, with or without wrappers such as DDP.
        checkpoint: The file's name.
        state: Its tensors by name.

    Raises:
        UserError: If weights are missing or have another shape.
    """
    while hasattr(model, 'module'):  # DDP, test-time augmentation
        model = model.module
    weights, state = dict(model.named_parameters()), dict(state)
    own = {**weights, **dict(model.named_buffers())}
    if hasattr(model, 'backbone'):
        rename_for(model.backbone, state, 'backbone.')  # as it does while loading
    wrong = [n for n, p in own.items() if n in state and _kind(state[n]) != _kind(p)]
    missing = [n for n in weights if n not in state]
    hint = None if missing else hidden_channels_hint(state, own, 'backbone.')
    if hint:
        raise UserError(f'checkpoint {checkpoint}: {hint}')
    if wrong:
        name = wrong[0]
        raise UserError(
            f'checkpoint {checkpoint} does not fit the config: {name} is '
            f'{_shape(state[name], own[name])} in the file and {_shape(own[name], state[name])} in '
            f'the model '
            f'({len(wrong)} such tensors; another number of classes, or another model?)'
        )
    if missing:
        raise UserError(
            f'checkpoint {checkpoint} does not fit the config: {len(missing)} of {len(weights)} '
            f'weights of the model are not in it ({missing[0]}, …)'
        )


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, bool, bool]:
    """What has to agree, since torch cannot convert it while loading."""
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def _shape(tensor: torch.Tensor, other: torch.Tensor) -> str:
    """The shape of a tensor, and its dtype if that is all that differs from another one."""
    shape = tuple(tensor.shape)
    return str(shape) if tensor.shape != other.shape else f'{shape} of {tensor.dtype}'
