"""Dynamic sparse training of any model that MMEngine trains."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.dist import broadcast, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from mmslak import sparsity as sp
from mmslak.engine.neurons import Neurons
from mmslak.engine.snip import (
    SparseTrainingError,
    check_known,
    named_parameters,
    on_a_batch,
    plain_name,
    snip_scores,
    unwrapped,
)
from mmslak.registry import HOOKS

DEFAULTS = dict(
    sparsity=0.4,
    init='snip',
    drop='magnitude',
    grow='random',
    prune_rate=dict(type='cosine', start=0.3, end=0.005),
    update_interval=100,
    stop_fraction=1.0,
    include=None,
    exclude=None,
    grown_state='keep',
    structure='weight',
    seed=0,
    resume_fallback=None,
)
# SLaK's published settings (its repository's training commands), and its fine-tuning downstream.
PRESETS = dict(
    slak_t=dict(prune_rate=dict(type='cosine', start=0.5, end=0.005), update_interval=2000),
    slak_s=dict(prune_rate=dict(type='cosine', start=0.3, end=0.005), update_interval=100),
    slak_b=dict(prune_rate=dict(type='cosine', start=0.3, end=0.005), update_interval=100),
    finetune=dict(init='from_weights', update_interval=0, include=r'^backbone\.'),
)
INITS = ('snip', 'erk', 'uniform', 'from_weights', 'map')
GROWTHS = ('random', 'gradient', 'momentum')
GROWN_STATES = ('keep', 'zero', 'mask')
STRUCTURES = ('weight', 'neuron', 'n:m')
DENSE = 0.99  # density from which the zeros of weights count as accidental
LARGE_KERNEL = 7  # sides above this count as large in the warning about ERK
KEY = 'sparse_training'
LEFT_OUT: Any = object()  # default of arguments, since None is a value of some


@HOOKS.register_module()
class SparseTrainingHook(Hook):
    """Keeps a fraction of the weights at exactly zero and moves the zeros while the model trains.

    After every optimizer step the weights are multiplied by their masks. After every
    `update_interval` steps each tensor drops the fraction `prune_rate(step)` of its active weights
    and grows as many, so that its number of non-zeros never changes. The hook and
    `checkpoint['sparse_training']` hold the masks; the model's state_dict has the names of a dense
    one. It works with AMP, accumulation, EMAHook, DDP and torch.compile, and experimentally on
    weights sharded by fully_shard (FSDP2). Source: SLaK (arXiv 2207.03620).

    Args:
        sparsity: Share of zeros over all masked tensors, in [0, 1). Not used by 'from_weights' and
            'map'.
        init: Where the masks come from: 'snip' (dict(type='snip', batches=1, mode='density'); mode
            'mask' keeps the scored positions and not only the number per tensor), 'erk', 'uniform',
            'from_weights' (the zeros that the weights have), or
            dict(type='map', sparsities={name or regular expression: sparsity}).
        drop: 'magnitude' or 'set' (smallest positive and largest negative weights).
        grow: 'random', 'gradient' or 'momentum'.
        prune_rate: dict(type='cosine'|'linear'|'constant', start=, end=) over optimizer steps, or
            one number.
        update_interval: Optimizer steps between updates; 0 keeps the masks fixed.
        stop_fraction: Share of the run after which the masks stay as they are, in (0, 1].
        include: Regular expressions (one or a list) on parameter names; default: every 2-D and 4-D
            parameter. Names are those of the model without wrappers. 1-D ones are never masked.
        exclude: Likewise; wins over include.
        grown_state: What becomes of the optimizer's state (momentum, Adam's moments) of grown
            weights: 'keep' (as it accumulated while they were zero, like the official code),
            'zero' (set to zero when grown) or 'mask' (held at zero while inactive). Zeroed moments
            late in training make Adam's first step about 16 times that of kept ones: its bias
            correction is over by then.
        structure: What the zeros are made of. 'weight': single weights. dict(type='neuron',
            share=0.4, until=0.75, score='umm'): besides, whole hidden units of MLPs go step by
            step, and what they had grows in the rest; dict(type='neuron', share=0.4, moving=True):
            they are gone from the start and move as weights do (`mmslak.engine.neurons`).
            dict(type='n:m', n=2, m=4): each m neighbours along the input of a linear layer have n
            non-zeros; other layers stay dense and `sparsity` is not used.
        seed: Base seed of everything random here; the same masks on every rank and after a resume.
        preset: 'slak_t', 'slak_s', 'slak_b' (published pre-training) or 'finetune' (fixed masks
            from the zeros of the loaded backbone); arguments given beside it win, None and the
            defaults too.
        resume_fallback: 'from_weights' resumes from checkpoints without masks by taking the
            weights' zeros; None makes that an error.

    Raises:
        ValueError: On settings out of range or names that are not known.
    """

    # After EMAHook (50), which averages what this hook then masks; before loggers and checkpoints.
    priority = 55

    def __init__(
        self,
        sparsity: float = LEFT_OUT,
        init: str | dict = LEFT_OUT,
        drop: str = LEFT_OUT,
        grow: str = LEFT_OUT,
        prune_rate: float | dict = LEFT_OUT,
        update_interval: int = LEFT_OUT,
        stop_fraction: float = LEFT_OUT,
        include: str | list[str] | None = LEFT_OUT,
        exclude: str | list[str] | None = LEFT_OUT,
        grown_state: str = LEFT_OUT,
        structure: str | dict = LEFT_OUT,
        seed: int = LEFT_OUT,
        preset: str | None = None,
        resume_fallback: str | None = LEFT_OUT,
    ) -> None:
        given = {k: v for k, v in locals().items() if k in DEFAULTS and v is not LEFT_OUT}
        if preset is not None:
            check_known('preset', preset, PRESETS)
        settings = {**DEFAULTS, **PRESETS.get(preset, {}), **given}
        for name, value in settings.items():
            if value is None and DEFAULTS[name] is not None:
                raise ValueError(
                    f'{name}: expected a value, got None; left out it is that of the preset, or '
                    f'{DEFAULTS[name]!r}'
                )
        vars(self).update(settings)
        init, rate = settings['init'], settings['prune_rate']
        self.init = dict(init if isinstance(init, dict) else dict(type=init))
        rate = rate if isinstance(rate, dict) else dict(type='constant', start=rate)
        self.prune_rate = dict(rate)
        self.include, self.exclude = _patterns(settings['include']), _patterns(settings['exclude'])
        self.structure = dict(
            self.structure if isinstance(self.structure, dict) else dict(type=self.structure)
        )
        self._neurons: Neurons | None = None
        self._n_m: tuple[int, int] | None = None
        self._check_settings()

        self.masks: sp.Masks | None = None
        self.step = 0  # optimizer steps done
        self._saved: dict | None = None
        self._resumed = False
        self._handles: list = []
        self._scores: dict[str, Tensor] | None = None  # of the gradient, for the update that is due
        self._grown: dict[str, Tensor] | None = None  # grown in the last step
        self._settled: dict[str, Tensor] | None = None  # grown one step ago: EMA takes their values
        self._update: sp.MaskUpdate | None = None  # done in this iteration, to be logged
        self._sharded = False
        self._local: dict[str, Tensor] = {}  # masks of this rank's shards, under FSDP2
        self._stepped = False  # the optimizer has called its hook in this iteration

    def _check_settings(self) -> None:
        if not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity < 1:
            raise ValueError(f'sparsity: expected a number in [0, 1), got {self.sparsity!r}')
        if not isinstance(self.update_interval, int) or self.update_interval < 0:
            raise ValueError(
                f'update_interval: expected a number of optimizer steps or 0 for fixed masks, '
                f'got {self.update_interval!r}'
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f'seed: expected an integer in [0, 2**32), got {self.seed!r}')
        if not 0 < self.stop_fraction <= 1:
            raise ValueError(f'stop_fraction: expected to be in (0, 1], got {self.stop_fraction!r}')
        check_known('init', self.init.get('type'), INITS)
        check_known('drop', self.drop, sp.DROP_METHODS)
        check_known('grow', self.grow, GROWTHS)
        check_known('prune_rate.type', self.prune_rate.get('type'), sp.SCHEDULES)
        check_known('grown_state', self.grown_state, GROWN_STATES)
        check_known('resume_fallback', self.resume_fallback, (None, 'from_weights'))
        takes = {'snip': {'batches', 'mode'}, 'map': {'sparsities'}}.get(self.init['type'], set())
        for key in set(self.init) - {'type'} - takes:
            raise ValueError(f'init: {self.init["type"]!r} takes no {key!r}')
        if self.init['type'] == 'map' and not self.init.get('sparsities'):
            raise ValueError("init: 'map' needs sparsities={name or regular expression: sparsity}")
        check_known('init.mode', self.init.get('mode', 'density'), ('density', 'mask'))
        self._schedule(1)
        self._check_structure()

    def _check_structure(self) -> None:
        kind, options = self.structure.get('type'), dict(self.structure)
        check_known('structure', kind, STRUCTURES)
        options.pop('type')
        takes = {'n:m': {'n', 'm'}, 'neuron': {'share', 'until', 'score', 'moving', 'pairs'}}
        for key in set(options) - takes.get(kind, set()):
            raise ValueError(f'structure: {kind!r} takes no {key!r}')
        if kind == 'neuron':
            self._neurons = Neurons(**options)
            if not self.update_interval:
                raise ValueError(
                    "structure: hidden units go at updates of the masks; with 'neuron', "
                    'update_interval cannot be 0'
                )
        elif kind == 'n:m':
            n, m = options.get('n', 2), options.get('m', 4)
            if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m):
                raise ValueError(f'structure: expected integers 0 < n < m, got n={n!r}, m={m!r}')
            if self.init['type'] in ('erk', 'map'):
                raise ValueError(
                    f"structure: 'n:m' has the same share everywhere; init={self.init['type']!r} "
                    "does not suit it, 'snip', 'uniform' and 'from_weights' do"
                )
            self._n_m = n, m

    def _schedule(self, steps: int) -> sp.Schedule:
        options = {k: v for k, v in self.prune_rate.items() if k != 'type'}
        try:
            return sp.SCHEDULES[self.prune_rate['type']](**options, steps=steps)
        except (TypeError, ValueError) as error:
            raise ValueError(f'prune_rate: {error}, got {self.prune_rate}') from error

    # ------------------------------------------------------------------ events of the runner

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the masks of a checkpoint until `before_train`, when the model is complete."""
        self._resumed = bool(runner._resume)
        self._saved = checkpoint.get(KEY)

    def before_train(self, runner: Runner) -> None:
        """Makes or restores the masks, applies them, and listens to the optimizer's steps.

        Raises:
            SparseTrainingError: If nothing matches, the interval is longer than the run, SNIP finds
                tensors without a gradient, masks do not fit, or there are several optimizers.
            NotImplementedError: Under FullyShardedDataParallel, and where FSDP2 is not supported.
        """
        optim_wrapper = runner.optim_wrapper
        single = isinstance(optim_wrapper, OptimWrapper)
        if not single or isinstance(optim_wrapper, OptimWrapperDict):
            raise SparseTrainingError(
                f'SparseTrainingHook needs one optimizer, got a {type(optim_wrapper).__name__}'
            )
        self._weights = self._find_weights(runner.model)
        self._with_biases = dict(self._weights)
        if self._neurons:
            run = on_a_batch(runner, self.seed) if self._neurons.pairs else None
            self._neurons.find(unwrapped(runner.model), self._weights, run)
            self._with_biases |= self._neurons.parameters
        self._sharded = any(_is_sharded(weight) for weight in self._weights.values())
        if self._sharded:
            self._check_sharded(runner)
        self._ema_weights = [
            {name: weights[name] for name in self._with_biases}
            for hook in runner.hooks
            if isinstance(hook, EMAHook)
            for weights in [named_parameters(hook.ema_model.module)]
        ]
        accumulation = optim_wrapper._accumulative_counts
        steps = -(-runner.max_iters // accumulation)
        if self.update_interval > steps:
            raise SparseTrainingError(
                f'update_interval: {self.update_interval} optimizer steps is longer than the run '
                f'of {steps}'
            )
        self._last_update = round(self.stop_fraction * steps)
        if self.update_interval >= self._last_update > 0:
            runner.logger.warning(
                f'Sparse training: no update in this run: the first would come after '
                f'{self.update_interval} optimizer steps, updates end before {self._last_update}'
            )
        self._rate = self._schedule(max(1, self._last_update))
        if self._neurons:
            self._neurons.plan(self.update_interval, steps, self._last_update)

        if not self._resumed:
            self.step = 0
            self.masks = self._initial_masks(runner)
            if self._neurons:
                self.masks.to(next(iter(self._weights.values())).device)
                self._neurons.start(self.masks, self.seed)
        elif self._saved is not None:
            self._restore(self._saved)
        elif self.resume_fallback == 'from_weights':
            self.step = runner.iter // accumulation
            self.masks = self._masks_of_weights()
            if self._neurons:
                self._neurons.take_from_weights()
        else:
            raise SparseTrainingError(
                f'the checkpoint {runner._load_from} that training resumes from has no masks '
                f"(no '{KEY}' in it): it was not trained with SparseTrainingHook. "
                "resume_fallback='from_weights' takes the zeros of its weights instead"
            )
        self._saved = None
        device = next(iter(self._weights.values())).device
        self.masks.to(device)
        if is_distributed():
            self._broadcast()
            if not self._resumed:
                self.masks = sp.Masks(self.masks.active)  # without the history of other draws
        self._share_masks()
        self._apply()
        for weights in self._ema_weights:
            self._apply_to(weights)
        optimizer = optim_wrapper.optimizer
        self._remove_handles()
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
        ]
        self._report_start(runner)

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Brings the averaged weights in line and logs an update.

        Raises:
            RuntimeError: If the optimizer stepped without calling its step hooks.
        """
        if not self._stepped and runner.optim_wrapper.should_update():
            self._check_zeros()
        self._stepped = False
        if self._settled is not None:
            for weights in self._ema_weights:
                for name, grown in self._settled.items():
                    live = self._weights[name]
                    weights[name].data.copy_(torch.where(grown, live, weights[name]))
            self._settled = None
        if self._update is not None:
            for weights in self._ema_weights:
                self._apply_to(weights)
            self._report_update(runner, self._update)
            self._update = None

    def after_train(self, runner: Runner) -> None:
        """Prints the table of all tensors."""
        self._remove_handles()
        runner.logger.info('Sparse training, by tensor:\n' + self.table())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds masks and progress; plain values and packed bits only."""
        if self.masks is not None:
            checkpoint[KEY] = self.state_dict()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict:
        """Masks, their history, steps done, and what the averaged weights still wait for."""
        grown = None if self._grown is None else sp.Masks(self._grown).packed().cpu()
        state = dict(version=1, structure=self._structure_name(), step=self.step, grown=grown)
        state['masks'] = self.masks.state_dict()
        if self._neurons:
            state['units'] = self._neurons.units.state_dict()
        return state

    def _structure_name(self) -> str:
        """'weight', 'neuron', or n and m such as '2:4'."""
        return '{}:{}'.format(*self._n_m) if self._n_m else self.structure['type']

    def _restore(self, state: dict) -> None:
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        self.masks = sp.Masks.dense(shapes)
        own = self._structure_name()
        try:
            saved = state.get('structure', own)  # older files do not say
            if saved != own:
                raise ValueError(f'they are of structure {saved!r}, the config asks for {own!r}')
            self.masks.load_state_dict(state['masks'])
            self.step = int(state['step'])
            self._grown = None
            if state['grown'] is not None:
                grown = sp.Masks.dense(shapes)
                grown.unpack_(state['grown'])
                device = next(iter(self._weights.values())).device
                self._grown = grown.to(device).active
            if self._n_m:
                self._check_n_m(self.masks, exactly=True)
            if self._neurons:
                if 'units' not in state:
                    raise ValueError("it was trained without structure=dict(type='neuron', …)")
                self._neurons.units.load_state_dict(state['units'])
        except (KeyError, TypeError, ValueError) as error:
            raise SparseTrainingError(
                f"the masks in the checkpoint (key '{KEY}') do not fit this model: {error}"
            ) from error

    def table(self) -> str:
        """Name, shape, non-zeros, density and Rs of every masked tensor, as lines of text."""
        width = max(len(name) for name in self.masks.active)
        lines = [f'{"tensor":{width}}  {"shape":>16}  {"non-zero":>12}  density      Rs']
        counts = self.masks.nnz
        for name, mask in self.masks.active.items():
            ever = int(self.masks.ever[name].count_nonzero()) / mask.numel()
            shape = '×'.join(map(str, mask.shape))
            lines.append(
                f'{name:{width}}  {shape:>16}  {counts[name]:>12,}  '
                f'{counts[name] / mask.numel():>7.4f}  {ever:>6.4f}'
            )
        total = sum(counts.values())
        lines.append(
            f'{"all":{width}}  {"":>16}  {total:>12,}  {self.masks.density:>7.4f}  '
            f'{self.masks.exploration_rate:>6.4f}'
        )
        return '\n'.join(lines)

    # ------------------------------------------------------------------ the start

    def _find_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters to mask by their name in the unwrapped model."""
        if any('FullyShardedDataParallel' in type(m).__name__ for m in model.modules()):
            raise NotImplementedError(
                'SparseTrainingHook does not support FullyShardedDataParallel: its parameters are '
                'flat shards, which have no masks of their own; use DDP '
                '(MMDistributedDataParallel) or, experimentally, fully_shard (FSDP2)'
            )
        named = named_parameters(model)
        matched = {}
        linear = {
            plain_name(f'{name}.weight')
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, nn.Linear)
        }
        for name, parameter in named.items():
            if self.include:
                wanted = parameter.dim() > 1 and any(p.search(name) for p in self.include)
            else:
                wanted = parameter.dim() in (2, 4)
            if self._n_m:
                wanted = wanted and name in linear and parameter.shape[1] % self._n_m[1] == 0
            if wanted and not any(p.search(name) for p in self.exclude):
                matched[name] = parameter
        weights = {name: p for name, p in matched.items() if p.requires_grad}
        if not weights and self._n_m:
            raise SparseTrainingError(
                f'structure: n:m masks the weights of nn.Linear whose inputs are a multiple of '
                f'{self._n_m[1]}; the model has none that include and exclude leave and is trained'
            )
        if not weights:
            raise SparseTrainingError(
                f'no parameter to mask: of {len(named)} parameters, {len(matched)} match '
                f'include={[p.pattern for p in self.include] or "2-D and 4-D"} without '
                f'exclude={[p.pattern for p in self.exclude]}, and none of those is trained; '
                f'the first names are {", ".join(list(named)[:3])}'
            )
        if len(weights) < len(matched):
            print_log(
                f'Sparse training: {len(matched) - len(weights)} frozen tensors are left alone',
                logger='current',
            )
        return weights

    def _check_sharded(self, runner: Runner) -> None:
        """Refuses settings that do not work on sharded weights."""
        unsupported = {
            "init='snip'": self.init['type'] == 'snip',
            "grow='momentum'": self.grow == 'momentum',
            f'grown_state={self.grown_state!r}': self.grown_state != 'keep',
            f'structure={self.structure["type"]!r}': self.structure['type'] != 'weight',
            'EMAHook': any(isinstance(hook, EMAHook) for hook in runner.hooks),
        }
        for what, used in unsupported.items():
            if used:
                raise NotImplementedError(
                    f'SparseTrainingHook does not support {what} under fully_shard (experimental)'
                )

    def _initial_masks(self, runner: Runner) -> sp.Masks:
        shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        kind = self.init['type']
        if kind == 'from_weights':
            return self._masks_of_weights()
        found = sp.Masks.from_nonzeros(self._whole_weights())
        if found.density < DENSE:
            runner.logger.warning(
                f'Sparse training: the weights come with {1 - found.density:.1%} zeros, as if from '
                f"sparse training; init={kind!r} draws other masks over them, 'from_weights' keeps "
                'them'
            )
        if self._n_m and kind == 'uniform':
            return self._n_m_masks(
                {n: sp.random_scores(s, self.seed, n, 0) for n, s in shapes.items()}
            )
        if kind == 'map':
            try:
                counts = sp.from_map(shapes, self.init['sparsities'])
            except (re.error, TypeError, ValueError) as error:
                raise SparseTrainingError(f'init.sparsities: {error}') from error
        elif kind == 'snip':
            scores = snip_scores(runner, list(shapes), self.init.get('batches', 1), self.seed)
            if self._n_m:
                return self._n_m_masks(scores)
            if self.init.get('mode') == 'mask':
                counts = sp.from_scores(scores, self.sparsity, dense_from=None)
                return sp.Masks.from_scores(scores, counts)
            counts = sp.from_scores(scores, self.sparsity)
        else:
            counts = {'erk': sp.erk, 'uniform': sp.uniform}[kind](shapes, self.sparsity)
        if kind == 'erk':
            self._warn_of_dense_kernels(runner, counts, shapes)
        return sp.Masks.random(shapes, counts, self.seed)

    def _masks_of_weights(self) -> sp.Masks:
        """Active where the weights are not zero; with n:m, also where groups have too few."""
        weights = self._whole_weights()
        found = sp.Masks.from_nonzeros(weights)
        if self._n_m:
            self._check_n_m(found)
            return self._n_m_masks(weights)
        return found

    def _n_m_masks(self, scores: dict[str, Tensor]) -> sp.Masks:
        """The n highest scores of every m."""
        n, m = self._n_m
        return sp.Masks({name: sp.n_m_mask(score.abs(), n, m) for name, score in scores.items()})

    def _check_n_m(self, masks: sp.Masks, exactly: bool = False) -> None:
        n, m = self._n_m
        for name, mask in masks.active.items():
            if not sp.is_n_m(mask, n, m, exactly):
                count = f'not {n} non-zeros' if exactly else f'more than {n} non-zeros'
                raise SparseTrainingError(
                    f'structure: the zeros of {name} are not {n}:{m}: some {m} neighbours have '
                    f'{count}'
                )

    def _warn_of_dense_kernels(self, runner: Runner, counts: dict, shapes: dict) -> None:
        large = [n for n, s in shapes.items() if len(s) == 4 and max(s[2:]) > LARGE_KERNEL]
        dense = set(sp.dense_layers(counts, shapes))
        if self.sparsity > 0 and large and dense.issuperset(large):
            runner.logger.warning(
                f'ERK leaves all {len(large)} large kernels dense at sparsity {self.sparsity}: '
                "they are not trained sparsely; init='snip' or 'uniform' makes them sparse"
            )

    # ------------------------------------------------------------------ the optimizer's steps

    def _due(self, step: int) -> bool:
        """Whether the masks change after a step; not after the last one, since the weights that
        are grown need a step to leave zero."""
        return bool(self.update_interval) and (
            step % self.update_interval == 0 and step < self._last_update
        )

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        if not self._due(self.step + 1) or _overflowed(optimizer):
            return
        # Accumulated, reduced, clipped: what the optimizer is about to use.
        if self._neurons:
            self._neurons.keep_gradients(self.step + 1)
        if self.grow == 'gradient':
            self._scores = {
                name: _whole(torch.zeros_like(w) if w.grad is None else sp.magnitude(w.grad))
                for name, w in self._weights.items()
            }

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        self._stepped = True
        if _overflowed(optimizer):  # a fused optimizer that GradScaler told to do nothing
            self._scores = None
            return
        self.step += 1
        self._apply()
        if self._neurons:
            self._neurons.clear_state_(optimizer)
        self._settled, self._grown = self._grown, None
        if self._due(self.step):
            self._update_masks(optimizer)
        if self.grown_state == 'mask':
            self._clear_state(optimizer, {n: ~m for n, m in self.masks.active.items()})

    def _update_masks(self, optimizer: torch.optim.Optimizer) -> None:
        scores, self._scores = self._scores, None
        if self.grow == 'momentum':
            scores = {n: _momentum(optimizer, w) for n, w in self._weights.items()}
        rate = self._rate(self.step)
        before = {n: m.clone() for n, m in self.masks.active.items()} if self._neurons else {}
        self._update = self.masks.update(
            self._whole_weights(),
            rate,
            seed=self.seed,
            scores=scores,
            drop=self.drop,
            allowed=self._neurons and self._neurons.allowed(),
            n_m=self._n_m,
        )
        if self._neurons:
            self._neurons.update(self.masks, self.step, rate, self.seed)
            grown = {n: m & ~before[n] for n, m in self.masks.active.items()}
            self._update = sp.MaskUpdate(grown, self._update.churn)
        if is_distributed():
            self._broadcast()
        self._share_masks()
        self._apply()
        if self._neurons:
            self._neurons.clear_state_(optimizer)
        if self.grown_state != 'keep':
            self._clear_state(optimizer, self._update.grown)
        if self._ema_weights:
            self._grown = self._update.grown

    def _check_zeros(self) -> None:
        """Checks the masks after an iteration in which no step was seen, as after an overflow."""
        for name, mask in self.masks.active.items():
            if bool(((_whole(self._weights[name]) != 0) & ~mask).any()):
                raise RuntimeError(
                    f'{name} has left its mask: the optimizer stepped without calling its step '
                    'hooks, which torch 2.1 takes away as soon as anything is compiled; train '
                    'without torch.compile or with a newer torch'
                )

    def _apply(self) -> None:
        with torch.no_grad():
            if not self._sharded:
                self._apply_to(self._with_biases)
                return
            for name, weight in self._weights.items():
                weight.to_local().mul_(self._local[name])

    def _apply_to(self, weights: dict[str, Tensor]) -> None:
        self.masks.apply_(weights)
        if self._neurons:
            self._neurons.units.apply_(weights)

    def _whole_weights(self) -> dict[str, Tensor]:
        return {name: _whole(weight.detach()) for name, weight in self._weights.items()}

    def _share_masks(self) -> None:
        """Cuts the masks as FSDP2 has cut the weights; every rank keeps the whole ones too."""
        if self._sharded:
            from torch.distributed.tensor import distribute_tensor

            self._local = {
                n: distribute_tensor(self.masks.active[n], w.device_mesh, w.placements).to_local()
                for n, w in self._weights.items()
            }

    def _broadcast(self) -> None:
        """Gives every rank the masks of the first one, to which they should be equal already."""
        packed = self.masks.packed()
        broadcast(packed, src=0)
        self.masks.unpack_(packed)
        if self._neurons:
            units = self._neurons.units
            numbers = {name: alive.to(torch.uint8) for name, alive in units.alive.items()}
            for tensor in numbers.values():
                broadcast(tensor, src=0)
            units.set_alive_(numbers)

    def _clear_state(self, optimizer: torch.optim.Optimizer, where: dict[str, Tensor]) -> None:
        """Zeroes the optimizer's state of the weights at the given positions."""
        for name, positions in where.items():
            weight = self._weights[name]
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(positions, 0)

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ reports

    def _report_start(self, runner: Runner) -> None:
        counts = self.masks.nnz
        total = sum(mask.numel() for mask in self.masks.active.values())
        nonzero = sum(counts.values())
        updates, interval = 'fixed masks', self.update_interval
        if interval:
            updates = f'an update every {interval} optimizer steps up to {self._last_update}'
        runner.logger.info(
            f'Sparse training: {len(counts)} tensors, {nonzero:,} of {total:,} weights active, '
            f'density {nonzero / total:.4f}; {updates}'
        )
        if self._neurons:
            runner.logger.info(f'Sparse training: {self._neurons.plan_in_words()}')
            missing = self._neurons.shortage(self.masks)
            if missing:
                runner.logger.warning(
                    f'Sparse training: beside the hidden units that go there is no room for '
                    f'{missing:,} weights: the number of non-zeros falls by as many; a higher '
                    'sparsity keeps it'
                )
        if self.init['type'] == 'from_weights' and nonzero / total >= DENSE:
            runner.logger.warning(
                f'Sparse training: the weights have no zeros to keep ({total - nonzero:,} of '
                f'{total:,} are 0), so that training is dense'
            )
        empty = [name for name, count in counts.items() if count == 0]
        if empty:
            runner.logger.warning(
                f'Sparse training: {len(empty)} of {len(counts)} masked tensors have no active '
                f'weight and stay zero for good: {", ".join(empty)}'
            )
        runner.visualizer.add_scalars(self._scalars(), step=runner.iter)

    def _report_update(self, runner: Runner, update: sp.MaskUpdate) -> None:
        rate = self._rate(self.step)
        runner.logger.info(
            f'Sparse training, step {self.step}: prune rate {rate:.4f}, churn {update.churn:.4f}, '
            f'{sum(self.masks.nnz.values()):,} active, Rs {self.masks.exploration_rate:.4f}'
            + (f', {self._neurons.report()}' if self._neurons else '')
        )
        scalars = {'sparse/prune_rate': rate, 'sparse/churn': update.churn, **self._scalars()}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _scalars(self) -> dict[str, float]:
        scalars = {
            'sparse/density': self.masks.density,
            'sparse/nonzero': sum(self.masks.nnz.values()),
            'sparse/exploration_rate': self.masks.exploration_rate,
        }
        layers = {f'sparse/density/{name}': d for name, d in self.masks.densities.items()}
        return scalars | layers | (self._neurons.scalars() if self._neurons else {})


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, 'found_inf', None)
    return found is not None and bool(found)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, 'full_tensor')  # DTensor, which torch 2.1 has elsewhere


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _momentum(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    state = optimizer.state.get(weight, {})
    for key in ('exp_avg', 'momentum_buffer'):
        if isinstance(state.get(key), Tensor):
            return sp.magnitude(state[key])
    return torch.zeros_like(weight)


def _patterns(expressions: str | Iterable[str] | None) -> list[re.Pattern]:
    expressions = [expressions] if isinstance(expressions, str) else expressions or []
    try:
        return [re.compile(expression) for expression in expressions]
    except re.error as error:
        raise ValueError(f'not a regular expression: {error.pattern!r} ({error})') from error
