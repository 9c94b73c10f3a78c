"""Hooks of users, and weights that pruning or a parametrization computes before each call."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune


def has_hooks(*modules: nn.Module) -> bool:
    """Whether any of the modules has hooks; these run only if the module is called."""
    return any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        for module in modules
    )


def make_permanent(module: nn.Module) -> None:
    """Replaces a weight that `torch.nn.utils.prune` or a parametrization computes by its value.

    Raises:
        ValueError: If something else computes it.
    """
    if parametrize.is_parametrized(module, 'weight'):
        with torch.enable_grad():  # else the weight becomes a buffer
            parametrize.remove_parametrizations(module, 'weight')
    elif 'weight' in vars(module):  # a hook puts it there before each call
        prune.remove(module, 'weight')
