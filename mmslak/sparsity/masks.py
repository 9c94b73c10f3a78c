"""The masks of a model: which weights are active now, and which ever were."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmslak.sparsity.distribution import Shapes, in_proportion
from mmslak.sparsity.n_m import drop_and_grow_n_m
from mmslak.sparsity.score import random_scores
from mmslak.sparsity.topology import drop_and_grow, drop_count, grow


@dataclass(frozen=True)
class MaskUpdate:
    """What one :meth:`Masks.update` changed.

    Attributes:
        grown: Per updated name, a bool tensor of the positions active now and not before.
        churn: Share of the updated masks' non-zeros that were replaced. Dropped weights that came
            straight back are not replaced.
    """

    grown: dict[str, Tensor]
    churn: float


class Masks:
    """Bool masks by parameter name, their history, and how they are applied, updated and saved.

    Attributes:
        active: {name: bool tensor}, True where the weight is trained. Changed in place, never
            replaced, except by :meth:`to`.
        ever: {name: bool tensor}, True where the weight has been active at any time.
        updates: Number of updates done; it selects the random numbers of the next one.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Copy ``masks`` (bool, any shapes) and start a new history.

        Raises:
            ValueError: A mask is not bool.
        """
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f'{name}: mask must be bool, got {mask.dtype}')
        self.active = {name: _copy(mask) for name, mask in masks.items()}
        self.ever = {name: _copy(mask) for name, mask in masks.items()}
        self.updates = 0

    @classmethod
    def dense(cls, shapes: Shapes) -> 'Masks':
        """Everything active: the start without sparsity, or room to load a state into."""
        return cls({name: torch.ones(tuple(s), dtype=torch.bool) for name, s in shapes.items()})

    @classmethod
    def random(cls, shapes: Shapes, counts: Mapping[str, int], seed: int) -> 'Masks':
        """Exactly ``counts[name]`` active positions per tensor, drawn at random from ``seed``.

        Raises:
            ValueError: A count does not fit its shape (the message names the tensor).
        """
        scores = {name: random_scores(shape, seed, name, 0) for name, shape in shapes.items()}
        return cls.from_scores(scores, counts)

    @classmethod
    def from_scores(cls, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> 'Masks':
        """The ``counts[name]`` highest scores of every tensor; equal ones by lowest flat index.

        Raises:
            ValueError: A count does not fit its shape or a score is NaN (the message names the
                tensor).
        """
        masks = {}
        for name, score in scores.items():
            try:
                masks[name] = grow(torch.zeros_like(score, dtype=torch.bool), score, counts[name])
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from error
        return cls(masks)

    @classmethod
    def from_nonzeros(cls, tensors: Mapping[str, Tensor]) -> 'Masks':
        """Active where the tensors are not zero, on their devices."""
        return cls({name: tensor.detach() != 0 for name, tensor in tensors.items()})

    @property
    def nnz(self) -> dict[str, int]:
        """Number of active weights per name."""
        return {name: int(mask.count_nonzero()) for name, mask in self.active.items()}

    @property
    def densities(self) -> dict[str, float]:
        """Share of active weights per name."""
        return {name: count / self.active[name].numel() for name, count in self.nnz.items()}

    @property
    def density(self) -> float:
        """Share of active weights over all masked tensors."""
        return sum(self.nnz.values()) / self._numel()

    @property
    def exploration_rate(self) -> float:
        """Rs: share of the masked tensors' weights that have ever been active.

        Source: Liu et al., In-Time Over-Parameterization (arXiv:2102.02887), section 3.
        """
        return sum(int(mask.count_nonzero()) for mask in self.ever.values()) / self._numel()

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Multiply every tensor by its mask in place; tensors without a mask are left alone.

        Args:
            tensors: Parameters, EMA weights or optimizer states by name, on the masks' device, any
                dtype.

        Raises:
            ValueError: A masked name is missing or has another shape.
        """
        self._check(tensors)
        for name, mask in self.active.items():
            tensors[name].mul_(mask)

    def update(
        self,
        weights: Mapping[str, Tensor],
        rate: float,
        *,
        seed: int = 0,
        scores: Mapping[str, Tensor] | None = None,
        drop: str = 'magnitude',
        names: Iterable[str] | None = None,
        allowed: Mapping[str, Tensor] | None = None,
        n_m: tuple[int, int] | None = None,
    ) -> MaskUpdate:
        """Drop ceil(rate · nnz) weights per tensor and grow as many; call :meth:`apply_`
        afterwards.

        All or nothing: after an error no mask has changed.

        Args:
            weights: Weights by name, already masked: what is grown starts at the value found there,
                0.
            rate: Share of the non-zeros to drop, in [0, 1].
            seed: Base seed of random growth.
            scores: Growth scores by name (gradient or momentum magnitudes); None grows at random.
            drop: 'magnitude' or 'set', see :func:`mmslak.sparsity.drop`.
            names: Tensors to update; None means all. Random growth is drawn per call, not per
                tensor.
            allowed: Bool masks by name outside of which nothing is active or grows, see
                :meth:`confine_`; tensors without one may grow everywhere.
            n_m: Move weights within groups of m that keep n non-zeros each, see
                :func:`mmslak.sparsity.drop_and_grow_n_m`.

        Raises:
            ValueError: A weight or score is missing, NaN or of another shape (the message names
                it); the rate is outside [0, 1]; unknown drop method.
        """
        names = list(self.active if names is None else names)
        self._check(weights, names)
        if scores is not None:
            self._check(scores, names)
        counts = {name: int(self.active[name].count_nonzero()) for name in names}
        new, grown = {}, {}
        for name in names:
            old = self.active[name]
            if scores is None:
                score = random_scores(old.shape, seed, name, self.updates + 1)
            else:
                score = scores[name]
            if allowed is not None and name in allowed:
                # There is always room inside: what was dropped a moment ago.
                score = score.to(old.device).masked_fill(~allowed[name], -math.inf)
            try:
                count = drop_count(counts[name], rate)
                if n_m is None:
                    new[name] = drop_and_grow(weights[name], old, score, count, drop)
                else:
                    new[name] = drop_and_grow_n_m(weights[name], old, score, count, *n_m)
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from error
            grown[name] = new[name] & ~old

        for name in names:
            self.active[name].copy_(new[name])
            self.ever[name].logical_or_(new[name])
        self.updates += 1
        replaced = sum(int(mask.count_nonzero()) for mask in grown.values())
        return MaskUpdate(grown, replaced / max(1, sum(counts.values())))

    def confine_(self, allowed: Mapping[str, Tensor], seed: int, draw: int) -> int:
        """Deactivates what lies outside of ``allowed`` and grows as many inside, at random.

        Each tensor makes up for its own weights as far as it has room; the others take the rest, in
        proportion to theirs. So the number of all non-zeros stays, unless nothing has room.

        Args:
            allowed: Bool masks by name, such as those of hidden units that are alive. Tensors that
                it does not name may grow everywhere; names without a mask are passed over.
            seed: Base seed of the growth.
            draw: Number of the call; every number gives other random positions.

        Returns:
            Number of weights that found no room.
        """
        lost, room = {}, {}
        for name, mask in self.active.items():
            before = int(mask.count_nonzero())
            if name in allowed:
                mask.logical_and_(allowed[name])
            lost[name] = before - int(mask.count_nonzero())
            room[name] = int(self._free(name, allowed).count_nonzero())
        counts = {name: min(lost[name], room[name]) for name in lost}
        left = {name: room[name] - counts[name] for name in room}
        owed = sum(lost.values()) - sum(counts.values())
        payable = min(owed, sum(left.values()))
        if payable:
            for name, extra in in_proportion(left, payable).items():
                counts[name] += extra
        for name, count in counts.items():
            if count:
                # Its own stream: an update of the same number draws in the same tensor.
                score = random_scores(self.active[name].shape, seed, f'{name}:confined', draw)
                score = score.to(self.active[name].device)
                score = score.masked_fill(~self._free(name, allowed), -math.inf)
                self.active[name].copy_(grow(self.active[name], score, count))
                self.ever[name].logical_or_(self.active[name])
        return owed - payable

    def _free(self, name: str, allowed: Mapping[str, Tensor]) -> Tensor:
        free = ~self.active[name]
        return free & allowed[name] if name in allowed else free

    def packed(self) -> Tensor:
        """All active masks as one 1-D uint8 tensor, a bit per weight, for one broadcast per
        update."""
        return torch.cat([_pack(mask) for mask in self.active.values()])

    def unpack_(self, packed: Tensor) -> None:
        """Take over the active masks that :meth:`packed` made on another rank, in place.

        They are added to ``ever``. To forget a history that was not the other rank's, use
        ``Masks(masks.active)`` after it.

        Raises:
            ValueError: The size does not fit the masks.
        """
        sizes = [_packed_size(mask.numel()) for mask in self.active.values()]
        if packed.dtype != torch.uint8 or packed.shape != (sum(sizes),):
            raise ValueError(
                f'packed masks must be {sum(sizes)} bytes (uint8, 1-D), '
                f'got {packed.dtype} of shape {tuple(packed.shape)}'
            )
        for (name, mask), part in zip(self.active.items(), packed.split(sizes), strict=True):
            mask.copy_(_unpack(part, mask.shape))
            self.ever[name].logical_or_(mask)

    def state_dict(self) -> dict[str, Any]:
        """Bit-packed CPU tensors and plain values only, so that ``torch.load(weights_only=True)``
        reads it."""
        return {
            'updates': self.updates,
            'shapes': {name: list(mask.shape) for name, mask in self.active.items()},
            'active': {name: _pack(mask).cpu() for name, mask in self.active.items()},
            'ever': {name: _pack(mask).cpu() for name, mask in self.ever.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved, on the present devices. After an error nothing has
        changed.

        Raises:
            ValueError: The state is incomplete or damaged, or its names or shapes are not those of
                the masks.
        """
        missing = {'updates', 'shapes', 'active', 'ever'} - set(state)
        if missing:
            raise ValueError(f'not a mask state: {", ".join(sorted(missing))} missing')
        for key in ('shapes', 'active', 'ever'):
            self._check_names(state[key], key)
        for name, mask in self.active.items():
            if list(state['shapes'][name]) != list(mask.shape):
                raise ValueError(
                    f'{name}: saved mask has shape {tuple(state["shapes"][name])}, '
                    f'the model has {tuple(mask.shape)}'
                )
            for key in ('active', 'ever'):
                if state[key][name].numel() != _packed_size(mask.numel()):
                    raise ValueError(f'{name}: {key!r} has the wrong number of bytes')
        for name, mask in self.active.items():
            mask.copy_(_unpack(state['active'][name], mask.shape))
            self.ever[name].copy_(_unpack(state['ever'][name], mask.shape))
        self.updates = int(state['updates'])

    def to(self, device: torch.device | str) -> 'Masks':
        """Move all masks to ``device`` and return self."""
        self.active = {name: mask.to(device) for name, mask in self.active.items()}
        self.ever = {name: mask.to(device) for name, mask in self.ever.items()}
        return self

    def _numel(self) -> int:
        return sum(mask.numel() for mask in self.active.values())

    def _check(self, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
        # Without this, broadcasting would let a wrong shape through.
        for name in self.active if names is None else names:
            if name not in self.active:
                raise ValueError(f'{name}: no such mask')
            if name not in tensors:
                raise ValueError(f'{name}: masked, but no such tensor was given')
            if tensors[name].shape != self.active[name].shape:
                raise ValueError(
                    f'{name}: mask has shape {tuple(self.active[name].shape)}, '
                    f'the tensor {tuple(tensors[name].shape)}'
                )

    def _check_names(self, saved: Mapping[str, Any], key: str) -> None:
        missing, unknown = set(self.active) - set(saved), set(saved) - set(self.active)
        if missing or unknown:
            raise ValueError(
                f'saved masks do not fit the model: {len(missing)} missing in {key!r} '
                f'{sorted(missing)[:3]}, {len(unknown)} unknown {sorted(unknown)[:3]}'
            )


def _copy(mask: Tensor) -> Tensor:
    return mask.detach().clone(memory_format=torch.contiguous_format)


def _packed_size(numel: int) -> int:
    return (numel + 7) // 8


def _pack(mask: Tensor) -> Tensor:
    bits = np.packbits(mask.cpu().reshape(-1).numpy())
    return torch.from_numpy(bits).to(mask.device)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)
