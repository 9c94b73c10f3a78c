"""How many non-zeros every layer gets: integer counts per name.

``uniform``, ``erk`` and ``from_scores`` hit the same global target, ``target_nonzeros``, exactly.
Everything is computed in integers and exact fractions, so that all ranks and all machines agree.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mmslak.sparsity.selection import largest

Shapes = Mapping[str, Sequence[int]]


def target_nonzeros(shapes: Shapes, sparsity: float) -> int:
    """Global number of non-zeros: N (1 - sparsity), rounded to the nearest integer (half to even).

    Args:
        shapes: Shape of every tensor by name.
        sparsity: Share of zeros in [0, 1), read as its decimal text: 0.4 is exactly 2/5.

    Raises:
        ValueError: ``shapes`` is empty or ``sparsity`` is outside [0, 1).
    """
    if not shapes:
        raise ValueError('no tensor to distribute non-zeros over')
    return round(sum(_numel(shapes).values()) * _density(sparsity))


def uniform(shapes: Shapes, sparsity: float) -> dict[str, int]:
    """Give every tensor the same density, up to the one weight that rounding costs.

    Returns:
        Non-zero count per name; the sum is ``target_nonzeros(shapes, sparsity)``. A tensor of a few
        weights may get 0.

    Raises:
        ValueError: As :func:`target_nonzeros`.
    """
    target = target_nonzeros(shapes, sparsity)
    sizes = _numel(shapes)
    return in_proportion(sizes, target)


def erk(shapes: Shapes, sparsity: float) -> dict[str, int]:
    """Erdős-Rényi-Kernel: density proportional to sum(shape) / prod(shape), at most 1.

    Tensors that would exceed density 1 stay dense and the others share what is left, until none
    exceeds it (:func:`dense_layers` tells which). At 40 % all large kernels of SLaK stay dense.

    Source: Evci et al., Rigging the Lottery (arXiv:1911.11134), section 3, "Sparsity distribution".

    Returns:
        Non-zero count per name; the sum is ``target_nonzeros(shapes, sparsity)``.

    Raises:
        ValueError: As :func:`target_nonzeros`.
    """
    target = target_nonzeros(shapes, sparsity)
    sizes = _numel(shapes)
    raw = {name: sum(shape) for name, shape in shapes.items()}  # raw density times numel
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        left = target - sum(sizes[name] for name in dense)
        scale = Fraction(left, sum(raw[name] for name in free)) if free else Fraction(0)
        full = {name for name in free if scale * raw[name] > sizes[name]}
        if not full:
            break
        dense |= full
    return _largest_remainder(
        {name: Fraction(n) if name in dense else scale * raw[name] for name, n in sizes.items()}
    )


def from_nonzeros(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the non-zeros that the tensors have, e.g. those of a sparse checkpoint."""
    return {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}


def from_map(shapes: Shapes, sparsities: Mapping[str, float]) -> dict[str, int]:
    """Give every tensor the sparsity that an explicit map says; tensors it does not name stay
    dense.

    Args:
        shapes: Shape of every tensor by name.
        sparsities: Sparsity in [0, 1) by name or regular expression (``re.search``). The exact name
            wins, then the first expression that matches.

    Returns:
        Non-zero count per name, each rounded by itself to the nearest integer.

    Raises:
        ValueError: A key matches no name, or a sparsity is outside [0, 1).
    """
    densities = {key: _density(sparsity) for key, sparsity in sparsities.items()}
    for key in sparsities:
        if key not in shapes and not any(re.search(key, name) for name in shapes):
            raise ValueError(f'{key!r} matches none of the {len(shapes)} tensors')

    def density(name: str) -> Fraction:
        if name in densities:
            return densities[name]
        matches = (value for key, value in densities.items() if re.search(key, name))
        return next(matches, Fraction(1))

    return {name: round(n * density(name)) for name, n in _numel(shapes).items()}


def from_scores(
    scores: Mapping[str, Tensor], sparsity: float, dense_from: float | None = 0.99
) -> dict[str, int]:
    """Count how many of the globally highest scores fall into every tensor (the SNIP start).

    A tensor at density ``dense_from`` or above becomes dense, as in SLaK. There this adds weights;
    here the other tensors pay for it: the remaining budget is ranked again among them, so the sum
    stays exact. Once they cannot pay, as with one tensor alone, nothing further becomes dense.

    Source: Lee et al., SNIP (arXiv:1810.02340), section 4.1, equation 6.

    Args:
        scores: Score tensor per name, any shapes, floating dtypes, one device.
        sparsity: Share of zeros in [0, 1).
        dense_from: Density in (0, 1] from which a tensor becomes dense; None promotes nothing.

    Returns:
        Non-zero count per name; the sum is ``target_nonzeros``. Equal scores: first tensor, lowest
        index.

    Raises:
        ValueError: As :func:`target_nonzeros`; or a score is NaN (the message names the tensor).
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f'{name}: scores contain NaN')
    sizes = {name: score.numel() for name, score in scores.items()}
    target = target_nonzeros({name: score.shape for name, score in scores.items()}, sparsity)
    threshold = 1 if dense_from is None else Fraction(str(dense_from))

    dense: set[str] = set()
    while True:
        free = {name: score for name, score in scores.items() if name not in dense}
        counts = sizes | _top_counts(free, target - sum(sizes[name] for name in dense))
        full = {name for name in free if counts[name] >= threshold * sizes[name]}
        owed = sum(sizes[name] - counts[name] for name in full)
        payable = sum(counts[name] for name in free if name not in full)
        if owed == 0 or owed > payable:
            return counts
        dense |= full


def in_proportion(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Splits ``total`` in proportion to ``sizes``, exactly; no part is above its size.

    Raises:
        ValueError: ``total`` is negative or above the sum of the sizes.
    """
    whole = sum(sizes.values())
    if not 0 <= total <= whole:
        raise ValueError(f'cannot take {total} of {whole}')
    return _largest_remainder({name: Fraction(n * total, whole or 1) for name, n in sizes.items()})


def dense_layers(counts: Mapping[str, int], shapes: Shapes) -> list[str]:
    """Names that ``counts`` leaves without a single zero."""
    return [name for name, n in _numel(shapes).items() if counts[name] == n]


def _numel(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _density(sparsity: float) -> Fraction:
    if not 0 <= sparsity < 1:
        raise ValueError(f'sparsity must be in [0, 1), got {sparsity}')
    # The decimal that the user wrote, not its binary neighbour: 0.4 of 10 weights is 4.
    return 1 - Fraction(str(sparsity))


def _largest_remainder(ideal: Mapping[str, Fraction]) -> dict[str, int]:
    """Round to integers with the same (integer) sum; equal remainders: the earlier name gains."""
    counts = {name: math.floor(value) for name, value in ideal.items()}
    missing = int(sum(ideal.values())) - sum(counts.values())
    by_remainder = sorted(ideal, key=lambda name: counts[name] - ideal[name])
    for name in by_remainder[:missing]:
        counts[name] += 1
    return counts


def _top_counts(scores: Mapping[str, Tensor], k: int) -> dict[str, int]:
    """How many of the k highest scores lie in each tensor."""
    picked = largest(torch.cat([score.detach().reshape(-1) for score in scores.values()]), k)
    parts = picked.split([score.numel() for score in scores.values()])
    return {name: int(part.count_nonzero()) for name, part in zip(scores, parts, strict=True)}
