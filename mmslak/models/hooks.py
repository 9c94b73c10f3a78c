"""What users hang on modules: hooks, and weights that pruning or a parametrization makes anew."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune


def has_hooks(*modules: nn.Module) -> bool:
    """Whether any of the modules has hooks, which run only where it is called."""
    return any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        for module in modules
    )


def make_permanent(module: nn.Module) -> None:
    """Makes a weight that `torch.nn.utils.prune` or a parametrization computes a plain parameter.

    Raises:
        ValueError: If hooks of another kind compute it.
    """
    if parametrize.is_parametrized(module, 'weight'):
        with torch.enable_grad():  # what needs no gradient becomes a buffer
            parametrize.remove_parametrizations(module, 'weight')
    elif 'weight' in vars(module):  # where hooks put it before each call
        prune.remove(module, 'weight')
