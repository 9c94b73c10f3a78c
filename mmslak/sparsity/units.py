"""Hidden units: entries of several tensors that live and die together.

A hidden unit of an MLP is a row of the first layer's weight with its bias, and a column of the
second layer's weight. Zeros that fill whole units can be taken out of a model for good, which makes
it smaller and faster on any machine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mmslak.sparsity.score import magnitude, random_scores, snip
from mmslak.sparsity.topology import drop, drop_count, grow

UNIT_SCORES = ('umm', 'l2', 'gradient')


@dataclass(frozen=True)
class UnitGroup:
    """The units of one hidden layer.

    Attributes:
        name: How messages call it, such as the name of the layer that makes the units.
        entries: Names of tensors, each with the dimension along which the units lie. Unit i is
            index i there.
    """

    name: str
    entries: tuple[tuple[str, int], ...]


def unit_scores(
    group: UnitGroup,
    tensors: Mapping[str, Tensor],
    method: str = 'umm',
    gradients: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """How much each unit matters.

    'umm' is the unmasked mean magnitude: the mean of |w| over all entries of a unit, zeros
    included, so that units with many zeros score low. 'l2' is the norm of all entries. 'gradient'
    is the mean of |w · dL/dw|. Source of 'umm': Yin et al., Dynamic Sparsity Is Channel-Level
    Sparsity Learner (NeurIPS 2023, arXiv:2305.19454), section 3.

    Args:
        group: The units.
        tensors: Weights by name, any shapes and floating dtypes.
        method: 'umm', 'l2' or 'gradient'.
        gradients: Gradients by name, for 'gradient'.

    Returns:
        1-D tensor of non-negative scores, at least float32.

    Raises:
        ValueError: Unknown method; a tensor or a gradient is missing; the tensors of the group have
            different numbers of units; a score is NaN.
    """
    if method not in UNIT_SCORES:
        raise ValueError(f'unknown score {method!r}, known: {", ".join(UNIT_SCORES)}')
    number = group_size(group, tensors)
    total, entries = 0, 0
    for name, dim in group.entries:
        if method == 'gradient':
            if gradients is None or name not in gradients:
                raise ValueError(f"{name}: score 'gradient' needs its gradient")
            values = snip(tensors[name], gradients[name])
        else:
            values = magnitude(tensors[name])
        if method == 'l2':
            values = values.square()
        total = total + values.movedim(dim, 0).reshape(number, -1).sum(1)
        entries += values.numel() // number
    scores = total.sqrt() if method == 'l2' else total / entries
    if scores.isnan().any():
        raise ValueError(f'{group.name}: scores of hidden units contain NaN')
    return scores


def group_size(group: UnitGroup, tensors: Mapping[str, Tensor]) -> int:
    """Number of units of a group.

    Raises:
        ValueError: A tensor is missing, or the tensors disagree.
    """
    sizes = {}
    for name, dim in group.entries:
        if name not in tensors:
            raise ValueError(f'{group.name}: no tensor {name}')
        sizes[name] = tensors[name].shape[dim]
    if len(set(sizes.values())) != 1:
        raise ValueError(f'{group.name}: tensors have different numbers of units: {sizes}')
    return next(iter(sizes.values()))


def removed_count(number: int, share: float, progress: float = 1.0) -> int:
    """How many of the units of a layer are gone: on a cubic schedule, an exact count at its end.

    The share rises as share · (1 - (1 - progress)³): fast at first, while the network can still
    mend itself. Source: Zhu and Gupta, To Prune, or Not to Prune (arXiv:1710.01878), equation 1.

    Args:
        number: Units of the layer; one of them always stays.
        share: Share of them that is gone at the end, in [0, 1), read as its decimal text.
        progress: Part of the schedule that is done; above 1 counts as 1.

    Raises:
        ValueError: ``share`` is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f'share must be in [0, 1), got {share}')
    done = min(max(Fraction(progress), Fraction(0)), Fraction(1))
    return min(round(Fraction(str(share)) * number * (1 - (1 - done) ** 3)), number - 1)


class Units:
    """Which hidden units of a model are alive.

    Attributes:
        alive: {name of a group: bool tensor (number of units,)}, changed in place by
            :meth:`set_alive_` alone, never replaced, except by :meth:`to`.
        updates: Number of calls of :meth:`move` done; it selects their random numbers.
    """

    def __init__(self, groups: Iterable[UnitGroup], tensors: Mapping[str, Tensor]) -> None:
        """All units of the groups are alive; ``tensors`` give sizes and device.

        Raises:
            ValueError: See :func:`group_size`; or two groups have the same name.
        """
        self.groups = {group.name: group for group in groups}
        self.alive = {}
        for name, group in self.groups.items():
            size, device = group_size(group, tensors), tensors[group.entries[0][0]].device
            self.alive[name] = torch.ones(size, dtype=torch.bool, device=device)
        self.updates = 0
        # Found when units change and kept: a GPU would have to stop for them at each step.
        self._dead: dict[str, Tensor] = {}
        self.set_alive_(self.alive)

    @property
    def counts(self) -> dict[str, int]:
        """Number of units that are alive, by group."""
        return {name: int(alive.count_nonzero()) for name, alive in self.alive.items()}

    def set_alive_(self, alive: Mapping[str, Tensor]) -> None:
        """Says which units are alive from now on, by group (bool or zeros and ones)."""
        for name, own in self.alive.items():
            own.copy_(alive[name])
            self._dead[name] = (~own).nonzero().reshape(-1)

    def remove(self, scores: Mapping[str, Tensor], gone: Mapping[str, int]) -> int:
        """Takes the units of the lowest scores, until ``gone[name]`` of each group are gone.

        A unit that is gone stays so. Among equal scores the lowest index goes first.

        Args:
            scores: Score of each unit by group, see :func:`unit_scores`.
            gone: Number of units that are to be gone, by group; where more are gone already,
                nothing happens.

        Returns:
            Number of units removed.

        Raises:
            ValueError: A score has the wrong shape or is NaN.
        """
        new = {}
        for name, alive in self.alive.items():
            count = max(0, gone[name] - int((~alive).count_nonzero()))
            new[name] = _named(name, drop, scores[name], alive, count)
        removed = sum(
            int((self.alive[name] ^ alive).count_nonzero()) for name, alive in new.items()
        )
        self.set_alive_(new)
        return removed

    def move(self, scores: Mapping[str, Tensor], rate: float, seed: int) -> dict[str, Tensor]:
        """Takes ceil(rate · alive) units of the lowest scores, and brings as many back at random.

        Units that were taken a moment ago may come back, as weights do in
        :func:`mmslak.sparsity.drop_and_grow`: they stay as they are.

        Args:
            scores: Score of each unit by group.
            rate: Share of the units to take, in [0, 1].
            seed: Base seed of the random choice.

        Returns:
            By group, a bool tensor of the units that are alive now and were not before.

        Raises:
            ValueError: As :meth:`remove`; or the rate is outside [0, 1].
        """
        new, grown = {}, {}
        for name, alive in self.alive.items():
            count = drop_count(int(alive.count_nonzero()), rate)
            draw = random_scores(alive.shape, seed, f'{name}:units', self.updates + 1)
            kept = _named(name, drop, scores[name], alive, count)
            new[name] = grow(kept, draw, count)
            grown[name] = new[name] & ~alive
        self.set_alive_(new)
        self.updates += 1
        return grown

    def allowed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool masks of the tensors of all groups: True where every unit of an entry is alive."""
        return self.positions(tensors, self.alive)

    def positions(
        self, tensors: Mapping[str, Tensor], units: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bool masks of the tensors of all groups: True where the given units have entries.

        A tensor of two groups, such as a layer between two hidden layers, needs both.

        Args:
            tensors: Tensors by name, for their shapes.
            units: Bool tensor of the units by group.
        """
        found: dict[str, Tensor] = {}
        for group in self.groups.values():
            for name, dim in group.entries:
                shape = [1] * tensors[name].dim()
                shape[dim] = -1
                mask = units[group.name].reshape(shape).expand(tensors[name].shape)
                found[name] = found[name] & mask if name in found else mask
        return found

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Zeroes the entries of units that are gone, in place.

        Args:
            tensors: Parameters, EMA weights or optimizer states by name; those that are missing
                are passed over.
        """
        for group in self.groups.values():
            dead = self._dead[group.name]
            if len(dead):
                for name, dim in group.entries:
                    if name in tensors:
                        tensors[name].index_fill_(dim, dead, 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        alive = {name: alive.cpu().clone() for name, alive in self.alive.items()}
        return {'updates': self.updates, 'alive': alive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` saved. After an error nothing has changed.

        Raises:
            ValueError: The state is of other groups, or of other numbers of units.
        """
        saved = state['alive']
        if set(saved) != set(self.alive):
            raise ValueError(
                f'saved hidden units are of {sorted(saved)[:3]}, not of {sorted(self.alive)[:3]}'
            )
        for name, alive in self.alive.items():
            if saved[name].shape != alive.shape or saved[name].dtype != torch.bool:
                raise ValueError(
                    f'{name}: {len(saved[name])} hidden units were saved, the model has '
                    f'{len(alive)}'
                )
        self.set_alive_(saved)
        self.updates = int(state['updates'])

    def to(self, device: torch.device | str) -> 'Units':
        """Move everything to ``device`` and return self."""
        self.alive = {name: alive.to(device) for name, alive in self.alive.items()}
        self._dead = {name: dead.to(device) for name, dead in self._dead.items()}
        return self


def _named(name: str, change: Any, *args: Any) -> Tensor:
    try:
        return change(*args)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error
