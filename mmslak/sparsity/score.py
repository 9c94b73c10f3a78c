"""Scores that say which weights matter: for the start (SNIP), for growth, and at random."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def snip(weight: Tensor, grad: Tensor) -> Tensor:
    """Connection sensitivity |w · dL/dw|.

    Source: Lee et al., SNIP (arXiv:1810.02340), section 4.1, equation 6 (not normalised: the
    ranking is the same).

    Args:
        weight: Any shape and floating dtype.
        grad: Gradient of the loss, the shape of ``weight``.

    Returns:
        Non-negative scores of the same shape, at least float32 (half precision would underflow).

    Raises:
        ValueError: The shapes differ.
    """
    if weight.shape != grad.shape:
        raise ValueError(
            f'weight {tuple(weight.shape)} and grad {tuple(grad.shape)} differ in shape'
        )
    return (_at_least_float32(weight) * _at_least_float32(grad)).abs()


def magnitude(tensor: Tensor) -> Tensor:
    """|tensor|: of the gradient for RigL's growth, of the momentum buffer for momentum growth.

    Args:
        tensor: Gradient, SGD momentum buffer or Adam's ``exp_avg``; any shape and floating dtype.

    Returns:
        Non-negative scores of the same shape, at least float32; a copy, so later steps do not
        change it.
    """
    return _at_least_float32(tensor).abs()


def random_scores(shape: Sequence[int], seed: int, name: str, update_index: int) -> Tensor:
    """Uniform scores that depend on the arguments only: the same on every rank and after a resume.

    Args:
        shape: Shape of the scores.
        seed: Base seed in [0, 2**32).
        name: Parameter name without wrappers' prefixes; every name has its own stream.
        update_index: 0 for the initial draw, then the number of the update from 1.

    Returns:
        float32 scores in [0, 1) on the CPU.

    Raises:
        ValueError: ``seed`` is outside [0, 2**32).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed must be in [0, 2**32), got {seed}')
    # XOR, not a shift: torch's CPU generator looks at the low 32 bits of its seed only.
    key = seed ^ zlib.crc32(f'{name}:{update_index}'.encode())
    generator = torch.Generator().manual_seed(key)
    # dtype and device are explicit: user defaults must not change the masks.
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device='cpu')


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
