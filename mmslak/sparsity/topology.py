"""Drop and grow: move non-zeros of one tensor without changing their number."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from mmslak.sparsity.selection import largest, smallest

DROP_METHODS = ('magnitude', 'set')


def drop_count(nnz: int, rate: float) -> int:
    """ceil(rate · nnz), with the rate read as its decimal text so that 0.07 of 100 is 7, not 8.

    Raises:
        ValueError: ``rate`` is outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f'prune rate must be in [0, 1], got {rate}')
    return math.ceil(Fraction(str(rate)) * nnz)


def drop(weight: Tensor, mask: Tensor, count: int, method: str = 'magnitude') -> Tensor:
    """Deactivate ``count`` active weights; equal ones in the order of their flat index.

    'magnitude' takes the smallest |w|. 'set' takes the smallest positive and the largest negative
    weights, in proportion to their numbers (Mocanu et al., SET, arXiv:1707.04780, algorithm 1);
    active weights of exactly zero go first.

    Args:
        weight: Any shape and floating dtype; only active entries are looked at.
        mask: Bool, the shape of ``weight``.
        count: 0 to the number of active weights.
        method: 'magnitude' or 'set'.

    Returns:
        A new bool mask with exactly ``count`` fewer True, a subset of ``mask``.

    Raises:
        ValueError: Unknown method; shapes differ; ``count`` is out of range; an active weight is
            NaN.
    """
    if method not in DROP_METHODS:
        raise ValueError(f'unknown drop method {method!r}, known: {", ".join(DROP_METHODS)}')
    _check_mask(mask, weight, 'weight')
    active = weight.detach()[mask]
    if not 0 <= count <= active.numel():
        raise ValueError(f'cannot drop {count} of {active.numel()} active weights')
    if active.isnan().any():
        raise ValueError('cannot rank active weights: some are NaN')

    dropped = smallest(active.abs(), count) if method == 'magnitude' else _set(active, count)
    return mask.masked_scatter(mask, ~dropped)


def grow(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Activate the ``count`` inactive positions of the highest score; equal ones by flat index.

    Args:
        mask: Bool, any shape.
        scores: The shape of ``mask``, any floating dtype and device; only inactive positions are
            looked at.
        count: 0 to the number of inactive positions.

    Returns:
        A new bool mask with exactly ``count`` more True, a superset of ``mask``, on its device.

    Raises:
        ValueError: Shapes differ; ``count`` is out of range; the score of an inactive position is
            NaN.
    """
    _check_mask(mask, scores, 'scores')
    free = ~mask
    candidates = scores.detach().to(mask.device)[free]
    if not 0 <= count <= candidates.numel():
        raise ValueError(f'cannot grow {count} weights in {candidates.numel()} free positions')
    if candidates.isnan().any():
        raise ValueError('cannot rank growth scores: some are NaN')
    return mask.masked_scatter(free, largest(candidates, count))


def drop_and_grow(
    weight: Tensor, mask: Tensor, scores: Tensor, count: int, method: str = 'magnitude'
) -> Tensor:
    """Drop ``count`` weights, then grow ``count`` of all positions that are inactive after the
    drop.

    Growth may choose a position that was dropped a moment ago (as SLaK and RigL do); it then simply
    stays active. So there is always room, even in a dense tensor, and the number of non-zeros never
    changes.

    Args:
        weight: See :func:`drop`.
        mask: See :func:`drop`.
        scores: Growth scores, see :func:`grow`.
        count: 0 to the number of active weights.
        method: See :func:`drop`.

    Returns:
        A new bool mask with as many True as ``mask``.

    Raises:
        ValueError: As :func:`drop` and :func:`grow`.
    """
    return grow(drop(weight, mask, count, method), scores, count)


def _set(active: Tensor, count: int) -> Tensor:
    """Mark ``count`` entries of the 1-D ``active``: zeros, then those next to zero on either
    side."""
    zero, positive, negative = active == 0, active > 0, active < 0
    num_zero, num_positive, num_negative = (
        int(sign.count_nonzero()) for sign in (zero, positive, negative)
    )
    if count <= num_zero:
        return smallest(active.abs(), count)
    rest = count - num_zero
    signed = num_positive + num_negative
    from_positive = (2 * rest * num_positive + signed) // (2 * signed)  # nearest, half up
    dropped = zero.clone()
    dropped[positive] = smallest(active[positive], from_positive)
    dropped[negative] = largest(active[negative], rest - from_positive)
    return dropped


def _check_mask(mask: Tensor, other: Tensor, what: str) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f'mask must be bool, got {mask.dtype}')
    if mask.shape != other.shape:
        raise ValueError(
            f'mask {tuple(mask.shape)} and {what} {tuple(other.shape)} differ in shape'
        )
