"""An interrupted run that is resumed computes what it would have computed, to the bit."""

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, get_worker_info

from mmslak.engine.resilience.random_states import (
    random_states,
    random_states_kept,
    restore_random_states,
)
from mmslak.engine.resilience.running import waiting_schedulers
from mmslak.ops import choices, restore_choices
from mmslak.registry import HOOKS

KEY = 'exact_resume'


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Saves all random states and the position in the data, so that a resumed run is the same run.

    - `checkpoint['exact_resume']` holds the states of Python, NumPy, torch and its devices, of
      every rank. Validation leaves the states as they were.
    - Checkpoints are written before the validation that is due at their iteration. A resumed run
      repeats this validation first if something depends on its score: ReduceOnPlateau, `save_best`,
      or EarlyStoppingHook, whose state is saved, too.
    - Every sample has its own seed, of the run's seed, rank, pass over the data, batch and position
      in the batch. So its augmentation depends neither on the number of workers nor on what a
      worker has loaded before.
    - Convolutions are computed by the methods that were measured to be fast in the first run
      (`mmslak.ops.tuning`), whatever would be measured now.
    - A resumed run goes on at the next batch, also in the middle of an epoch. The batches before it
      are drawn from the sampler and not loaded.

    It works with epoch- and iteration-based loops, any number of workers, and any sampler that
    depends on its seed and epoch only. `SafeCheckpointHook` has to write the checkpoints: it saves
    the states of all ranks, and writes best checkpoints after the validation. If the resumed run
    cannot be the same, the log says why, once.
    """

    priority = 'LOWEST'  # the states are restored after everything else is set up

    def __init__(self) -> None:
        self._saved: dict | None = None
        self._resumed = False
        self._warned: set[str] = set()
        self._gathered: list[dict] | None = None
        self._before_val: dict | None = None
        self._validated = False  # the validation after the last iteration is over
        self._shift = 0  # batches of the first epoch that came before the interruption
        self._place = 0  # batches of this epoch or pass that were trained on
        self._batches: _SeededBatches | None = None
        self._iterator: _BatchIterator | None = None

    # ------------------------------------------------------------------ events of the runner

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the saved states until `before_train`."""
        self._resumed = bool(runner._resume)
        self._saved = checkpoint.get(KEY) if self._resumed else None
        if self._resumed and 'optimizer' not in checkpoint:
            runner.logger.warning(
                'Resumed from a checkpoint without the state of the optimizer (save_optimizer='
                'False): the run is not the same as without the interruption'
            )

    def before_train(self, runner: Runner) -> None:
        """Moves the data loader to its position and restores the random states."""
        self._before_val = None  # left by a validation that raised
        state = self._own_state(runner)
        self._install(runner, state)
        if state is not None:
            restore_random_states(state['random'])
            restore_choices(state.get('choices', {}))
            for name, parameter in runner.model.named_parameters():
                if name in state['gradients']:
                    parameter.grad = state['gradients'][name].to(parameter.device)
            for name, count in state.get('counts', {}).items():
                runner.optim_wrapper[name]._inner_count = count
        saved = self._saved or {}
        for hook, scores in zip(_early_stopping(runner), saved.get('early_stopping', ())):
            hook.wait_count, hook.best_score = scores
        if self._resumed and not saved.get('validated', False) and self._validation_is_due(runner):
            if _score_matters(runner):
                runner.logger.info('The validation after the checkpoint comes first')
                runner.val_loop.run()
            else:
                runner.logger.info(
                    'The validation after the checkpoint is not repeated: '
                    'nothing depends on its score'
                )
        self._saved = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Starts to count batches."""
        self._place = self._shift

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Counts batches."""
        self._place = batch_idx + 1
        self._gathered, self._validated = None, False

    def after_train_epoch(self, runner: Runner) -> None:
        """Lets the next epoch begin at its first batch."""
        self._shift = self._place = 0

    def before_val(self, runner: Runner) -> None:
        """Saves the random states."""
        self._before_val = random_states()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Notes that all hooks but those of best checkpoints have the score."""
        self._validated = True

    def after_val(self, runner: Runner) -> None:
        """Restores the random states."""
        if self._before_val is not None:
            restore_random_states(self._before_val)
        self._before_val = None

    def before_gather_checkpoint(self, runner: Runner) -> None:
        """Collects the states of all ranks; called on all of them."""
        self._gathered = all_gather_object(self._state(runner))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the states; plain values and tensors only."""
        if self._batches is None and self._iterator is None:
            return  # not in training
        iterator, sampler = self._iterator, self._batches and self._batches.sampler
        checkpoint[KEY] = dict(
            version=1,
            world_size=get_world_size(),
            epoch=runner.epoch if iterator is None else iterator.epoch,
            place=self._place if iterator is None else iterator.taken,
            batch_size=getattr(self._batches, 'batch_size', None),
            samples=len(runner.train_dataloader.dataset),
            sampler_seed=getattr(sampler, 'seed', None),
            validated=self._validated,
            early_stopping=[(h.wait_count, float(h.best_score)) for h in _early_stopping(runner)],
            ranks=self._gathered or [self._state(runner)],
        )

    # ------------------------------------------------------------------ state

    def _state(self, runner: Runner) -> dict:
        return dict(
            seed=self._seed,
            random=self._before_val or random_states(),
            gradients=self._pending_gradients(runner),
            counts=_counts(runner),
            choices=choices(),
        )

    def _pending_gradients(self, runner: Runner) -> dict[str, Tensor]:
        """Gradients that were accumulated and wait for an optimizer's step."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            return {}
        # Several optimizers: what is there, since each steps, and clears its own, when it wants.
        if not isinstance(wrapper, OptimWrapperDict) and wrapper.should_update():
            return {}
        gradients = {
            name: parameter.grad.detach().cpu()
            for name, parameter in runner.model.named_parameters()
            if parameter.grad is not None
        }
        if gradients and get_world_size() > 1:
            self._warn_once(
                runner,
                'a checkpoint between two optimizer steps lacks the accumulated gradients '
                'of several processes',
            )
            return {}
        return gradients

    def _own_state(self, runner: Runner) -> dict | None:
        """This rank's part of the checkpoint's states."""
        self._seed = int(runner.seed or 0)
        if not self._resumed:
            return None
        if self._saved is None:
            self._warn_once(
                runner, 'the checkpoint has no random states (no ExactResumeHook wrote it)'
            )
            return None
        if torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled():
            self._warn_once(
                runner,
                'CUDA kernels are not deterministic '
                '(randomness=dict(deterministic=True) asks for those that are)',
            )
        ranks, world = self._saved['ranks'], get_world_size()
        if self._saved['world_size'] != world:
            before = self._saved['world_size']
            self._warn_once(
                runner, f'it was trained by {before} processes before, and by {world} now'
            )
        elif len(ranks) < world:
            self._warn_once(
                runner,
                'the checkpoint has the random states of one rank only; '
                'mmslak.SafeCheckpointHook keeps those of all',
            )
        if get_rank() >= len(ranks):
            return None
        state = ranks[get_rank()]
        self._seed = state['seed']
        return state

    def _validation_is_due(self, runner: Runner) -> bool:
        """Whether the loop would have validated after the checkpoint; by its own rule."""
        loop = runner.train_loop
        if runner.val_loop is None or self._batches is None:
            return False
        if isinstance(loop, EpochBasedTrainLoop):
            done, total = loop.epoch, loop.max_epochs
            if self._shift or (self._saved is None and loop.iter != done * len(loop.dataloader)):
                return False  # in the middle of an epoch
        else:
            done, total = loop.iter, loop.max_iters
        loop._decide_current_val_interval()
        return done >= max(1, loop.val_begin) and (done % loop.val_interval == 0 or done == total)

    def _warn_once(self, runner: Runner, why: str) -> None:
        if why not in self._warned:
            runner.logger.warning(f'A resumed run is not the same to the bit: {why}')
        self._warned.add(why)

    # ------------------------------------------------------------------ the place in the data

    def _install(self, runner: Runner, state: dict | None) -> None:
        """Gives the loop a data loader like its own, with seeded batches, at the right position.

        MMEngine has no event between a sampler and the workers that load its batches.
        """
        loop, loader = runner.train_loop, runner.train_loop.dataloader
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if loader.batch_sampler is None or not (by_epoch or hasattr(loop, 'dataloader_iterator')):
            if self._resumed:
                self._warn_once(
                    runner, 'its loop or dataset is of a kind whose place cannot be kept'
                )
            return
        batches = loader.batch_sampler
        if isinstance(batches, _SeededBatches):  # trained before, with the same runner
            batches = batches.batches
        self._rewind(runner, batches)
        epoch, place = self._position(runner, batches, by_epoch)
        self._batches = _SeededBatches(batches, (self._seed, get_rank()), place)
        loader = _with_batches(loader, self._batches)
        loop.dataloader = loader
        if by_epoch:
            self._batches.epoch = lambda: loop.epoch
            self._shift = place
            self._number_from(loop)
        else:
            ignored = 0 if hasattr(loop.dataloader_iterator, 'skip_iter') else loop.iter
            self._iterator = _BatchIterator(loader, epoch, place, ignored)
            self._batches.epoch = lambda: self._iterator.epoch
            loop.dataloader_iterator = self._iterator

    def _position(self, runner: Runner, batches: BatchSampler, by_epoch: bool) -> tuple[int, int]:
        """(passes over the data, batches of this one) that are done."""
        loop, saved = runner.train_loop, self._saved
        infinite = isinstance(batches.sampler, InfiniteSampler)
        if loop.iter == 0:
            return 0, 0
        if saved is None or saved['batch_size'] != getattr(batches, 'batch_size', None):
            if saved is not None:
                self._warn_once(runner, 'the batch size is another one')
            if by_epoch:
                return loop.epoch, max(0, loop.iter - loop.epoch * len(batches)) % len(batches)
            return (0, loop.iter) if infinite else divmod(loop.iter, len(batches))
        if saved['samples'] != len(loop.dataloader.dataset):
            self._warn_once(runner, 'the dataset has another size')
        if by_epoch:
            return loop.epoch, saved['place'] if saved['epoch'] == loop.epoch else 0
        return saved['epoch'], saved['place']

    def _rewind(self, runner: Runner, batches: BatchSampler) -> None:
        """Sets the sampler to its seed and start; loops of MMEngine 0.10 draw ahead when built."""
        sampler = batches.sampler
        if self._saved is not None and self._saved['sampler_seed'] is not None:
            sampler.seed = self._saved['sampler_seed']
        if isinstance(sampler, InfiniteSampler):
            sampler.indices = sampler._indices_of_rank()
        for name in ('_aspect_ratio_buckets', '_buckets'):  # of mmdet's batch samplers
            for half_filled in getattr(batches, name, ()):
                half_filled.clear()
        if self._resumed and isinstance(sampler, RandomSampler):
            self._warn_once(runner, 'the order of a RandomSampler of torch cannot be restored')

    def _number_from(self, loop: EpochBasedTrainLoop) -> None:
        """Batches keep their numbers in an epoch that goes on in its middle.

        MMEngine has no event for that: the loop counts from 0 and tells the hooks.
        """
        run_iter = type(loop).run_iter.__get__(loop)
        loop.run_iter = lambda idx, data_batch: run_iter(idx + self._shift, data_batch)


def _counts(runner: Runner) -> dict[str, int]:
    """How many losses each of several optimizers got; MMEngine restores it for a single one."""
    several = runner.optim_wrapper
    if not isinstance(several, OptimWrapperDict):
        return {}
    return {name: wrapper._inner_count for name, wrapper in several.items()}


def _early_stopping(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _score_matters(runner: Runner) -> bool:
    """Whether a validation changes how training goes on, or which checkpoint is the best."""
    return (
        bool(waiting_schedulers(runner))
        or any(isinstance(hook, CheckpointHook) and hook.save_best for hook in runner.hooks)
        or bool(_early_stopping(runner))
    )


class _BatchIterator:
    """Batches for an iteration-based loop, pass after pass."""

    def __init__(self, loader: DataLoader, epoch: int, taken: int, ignored: int) -> None:
        self.loader, self.epoch, self.taken = loader, epoch, taken
        self._ignored = ignored  # calls by which loops of MMEngine 0.10 skip batches
        self._iterator: Iterator | None = None

    def __iter__(self) -> '_BatchIterator':
        return self

    def skip_iter(self, num_iters: int) -> None:
        """Does nothing: newer loops skip batches by this, and these begin at the right one."""

    def __next__(self) -> object:
        if self._ignored:
            self._ignored -= 1
            return None
        if self._iterator is None:
            self._start()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.epoch, self.taken = self.epoch + 1, 0
            self._start()
            batch = next(self._iterator)
        self.taken += 1
        return batch

    def _start(self) -> None:
        sampler = self.loader.batch_sampler.sampler
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self.epoch)
        self._iterator = iter(self.loader)


class _SeededBatches:
    """Another sampler's batches, with the seeds of their samples; the first pass can begin late."""

    def __init__(self, batches: BatchSampler, key: tuple[int, int], skip: int) -> None:
        self.batches, self._key, self._skip = batches, key, skip
        self.epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> object:
        if name == 'batches':  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator['_SeededBatch']:
        epoch, skip, self._skip = self.epoch(), self._skip, 0
        for number, indices in enumerate(self.batches):
            if number >= skip:
                yield _SeededBatch(indices, (*self._key, epoch, number))


class _SeededBatch(list):
    """Indices of a batch; iterating over them seeds the random generators before each one.

    A worker iterates over the indices and loads each sample, so no dataset needs to be wrapped.
    """

    def __init__(self, indices: list[int], key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key

    def __reduce__(self) -> tuple:
        return _SeededBatch, (self[:], self.key)

    def __iter__(self) -> Iterator[int]:
        # A worker does nothing else; the main process has a model, too.
        alone = get_worker_info() is not None
        with nullcontext() if alone else random_states_kept(devices=False):
            for place in range(len(self)):
                _seed((*self.key, place))
                yield self[place]


def _seed(key: tuple[int, ...]) -> None:
    """Seeds Python, NumPy and torch's CPU generator; those of devices belong to the model."""
    first, second, third = np.random.SeedSequence([part % 2**32 for part in key]).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.default_generator.manual_seed(int(third))


def _with_batches(loader: DataLoader, batches: _SeededBatches) -> DataLoader:
    """A loader like another, with other batches and a generator of its own.

    A loader draws from the generator whenever it begins, which a resumed run does once more.
    """
    several = dict(
        prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(batches._key[0]),
        **(several if loader.num_workers else {}),
    )
