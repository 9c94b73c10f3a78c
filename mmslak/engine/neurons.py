"""Hidden units that go, or move, while a model trains sparsely."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmslak import sparsity as sp
from mmslak.engine.snip import SparseTrainingError, check_known, named_parameters, plain_name

UNIFORM_STD = 12**-0.5  # of numbers that are uniform in [0, 1)


class Neurons:
    """The structure `dict(type='neuron', …)` of `SparseTrainingHook`.

    Source: Yin et al., Dynamic Sparsity Is Channel-Level Sparsity Learner (NeurIPS 2023,
    arXiv:2305.19454).

    Args:
        share: Share of the hidden units of each layer that is gone at the end, in (0, 1).
        until: Part of the run in which they go, in (0, 1].
        score: Which units go first: 'umm', 'l2' or 'gradient', see `mmslak.sparsity.unit_scores`.
        moving: The share is gone from the start on, and each update takes the prune rate's part of
            the units that are alive and brings as many back at random.
        pairs: Regular expressions of layers, see `mmslak.sparsity.find_hidden_layers`. None finds
            them.

    Raises:
        ValueError: On settings out of range.
    """

    def __init__(
        self,
        share: float = 0.4,
        until: float = 0.75,
        score: str = 'umm',
        moving: bool = False,
        pairs: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f'structure.share: expected a number in (0, 1), got {share!r}')
        if not 0 < until <= 1:
            raise ValueError(f'structure.until: expected a number in (0, 1], got {until!r}')
        check_known('structure.score', score, sp.UNIT_SCORES)
        self.share, self.until, self.score, self.moving = share, until, score, moving
        self.pairs = pairs
        self.units: sp.Units | None = None
        self.parameters: dict[str, nn.Parameter] = {}  # all that have entries of units
        self.gradients: dict[str, Tensor] | None = None  # for the update that is due

    def find(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        run: Callable[[], object] | None = None,
    ) -> None:
        """Finds the hidden layers, all of whose units are alive at first.

        Args:
            model: The model without wrappers.
            weights: The masked ones. Layers of which none is masked are left alone.
            run: Runs the model on a batch, which checks pairs that were given.

        Raises:
            SparseTrainingError: If there is none, or a given pair cannot be taken.
        """
        try:
            layers = sp.find_hidden_layers(model, self.pairs)
            if self.pairs and run is not None:
                sp.probe(model, layers, run)
        except ValueError as error:
            raise SparseTrainingError(f'structure: {error}') from error
        groups = []
        for layer in layers:
            entries = tuple((plain_name(name), dim) for name, dim in layer.entries)
            if any(name in weights for name, _ in entries):
                groups.append(sp.UnitGroup(plain_name(layer.first), entries))
        if not groups:
            raise SparseTrainingError(
                f'structure: no weight of the hidden layers ({layers[0].first}, …) is masked: '
                'include and exclude leave them out, or they are frozen'
            )
        parameters = named_parameters(model)
        self.parameters = {name: parameters[name] for g in groups for name, _ in g.entries}
        self.units = sp.Units(groups, self.parameters)

    def plan(self, interval: int, steps: int, last_update: int) -> None:
        """Sets the step of the last removal, which reaches the share.

        Args:
            interval: Optimizer steps between updates.
            steps: Optimizer steps of the run.
            last_update: Updates come before this step.

        Raises:
            SparseTrainingError: If there is no update in which units could go.
        """
        last = min(int(self.until * steps), last_update - 1)
        self.last = last // interval * interval if interval else 0
        if not self.last:
            raise SparseTrainingError(
                f'structure: no update in the first {last} optimizer steps in which hidden units '
                f'could go (update_interval={interval}); set update_interval to a tenth of them'
            )

    def is_removing(self, step: int) -> bool:
        """Whether units go or move in the update after a step."""
        return self.moving or step <= self.last

    def plan_in_words(self) -> str:
        """What will become of the units, in a line."""
        gone = sum(self._gone(1).values())
        if self.moving:
            return f'{self.report()}; {gone:,} are gone and move at every update'
        return f'{self.report()}; {gone:,} are to be gone after {self.last} optimizer steps'

    def shortage(self, masks: sp.Masks) -> int:
        """How many non-zeros have no room once all units that are to go are gone."""
        gone = self._gone(1)
        left = {
            name: torch.arange(len(alive), device=alive.device) >= gone[name]
            for name, alive in self.units.alive.items()
        }
        positions = self.units.positions(self.parameters, left)
        room = sum(
            int(positions[name].count_nonzero()) if name in positions else mask.numel()
            for name, mask in masks.active.items()
        )
        return max(0, sum(masks.nnz.values()) - room)

    def take_from_weights(self) -> None:
        """Takes units as alive unless all their weights are zero."""
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        groups = self.units.groups.items()
        self.units.set_alive_({n: sp.unit_scores(group, tensors) > 0 for n, group in groups})

    def keep_gradients(self, step: int) -> None:
        """Keeps the gradients of a step for the update after it, if its scores need them."""
        if self.score != 'gradient' or not self.is_removing(step):
            return
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.parameters.items()
        }

    def start(self, masks: sp.Masks, seed: int) -> None:
        """Takes the share away before the first step, if units move.

        The masks are confined to the units that are alive.
        """
        if self.moving:
            self.units.remove(self._scores(masks, 'umm'), self._gone(1))
            masks.confine_(self.allowed(), seed, 0)

    @torch.no_grad()
    def update(self, masks: sp.Masks, step: int, rate: float, seed: int) -> None:
        """Removes units after a step, or moves them, and grows elsewhere what their weights were.

        Args:
            masks: Masks of the weights, already updated; the weights are not yet masked by them.
            step: Optimizer steps done.
            rate: Share of the units to move.
            seed: Base seed.
        """
        if not self.is_removing(step):
            return
        scores, self.gradients = self._scores(masks, self.score), None
        if not self.moving:
            self.units.remove(scores, self._gone(step / self.last))
            masks.confine_(self.allowed(), seed, masks.updates)
            return
        grown = self.units.move(scores, rate, seed)
        masks.confine_(self.allowed(), seed, masks.updates)
        self._wake(grown, masks, seed)

    def allowed(self) -> dict[str, Tensor]:
        """Positions of units that are alive, by parameter."""
        return self.units.allowed(self.parameters)

    def clear_state_(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes the optimizer's state of units that are gone."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    states.setdefault(key, {})[name] = value
        for tensors in states.values():
            self.units.apply_(tensors)

    def report(self) -> str:
        """How many units are alive, in a line."""
        alive = self.units.counts
        total = sum(len(units) for units in self.units.alive.values())
        return f'{sum(alive.values()):,} of {total:,} hidden units in {len(alive)} layers'

    def scalars(self) -> dict[str, float]:
        """Units that are alive, of all layers and of each."""
        counts = self.units.counts
        layers = {f'sparse/units/{name}': count for name, count in counts.items()}
        return {'sparse/units': sum(counts.values()), **layers}

    def _gone(self, progress: float) -> dict[str, int]:
        return {
            name: sp.removed_count(len(alive), self.share, progress)
            for name, alive in self.units.alive.items()
        }

    def _scores(self, masks: sp.Masks, method: str) -> dict[str, Tensor]:
        active = masks.active
        tensors = {
            name: parameter.detach() * active[name] if name in active else parameter.detach()
            for name, parameter in self.parameters.items()
        }
        return {
            name: sp.unit_scores(group, tensors, method, self.gradients)
            for name, group in self.units.groups.items()
        }

    def _wake(self, grown: Mapping[str, Tensor], masks: sp.Masks, seed: int) -> None:
        """Gives units that came back random incoming weights.

        With zeros on both sides no gradient would ever reach them. What they send is zero, so that
        the outputs of the model stay.
        """
        for name, group in self.units.groups.items():
            first, _ = group.entries[0]
            weight, active = self.parameters[first].data, masks.active.get(first)
            new = self.units.positions(self.parameters, {**self.units.alive, name: grown[name]})
            new = new[first] if active is None else new[first] & active
            if not bool(new.any()):
                continue
            others = weight[(weight != 0) & ~new]
            std = others.float().std(unbiased=False) if others.numel() else 0.02
            draw = sp.random_scores(weight.shape, seed, f'{first}:waking', self.units.updates)
            values = ((draw.to(weight.device) - 0.5) * (std / UNIFORM_STD)).to(weight.dtype)
            weight.copy_(torch.where(new, values, weight))
