"""SNIP scores and outputs of a model that MMEngine trains, from its own data."""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_reduce
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmslak.engine.resilience.random_states import random_states_kept
from mmslak.errors import UserError
from mmslak.sparsity import snip


class SparseTrainingError(UserError):
    """Sparse training cannot begin; the message is one line that says what to set."""


def check_known(what: str, value: object, known: Iterable) -> None:
    """Raises ValueError unless a setting has one of the known values."""
    if value not in known:
        names = ', '.join(map(repr, known))
        raise ValueError(f'unknown {what} {value!r}: expected one of {names}')


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if is_model_wrapper(model) else model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names without the prefixes of DDP and torch.compile."""
    return {plain_name(n): p for n, p in unwrapped(model).named_parameters()}


def plain_name(name: str) -> str:
    """A name without the prefixes of torch.compile."""
    return name.replace('_orig_mod.', '')


def snip_scores(runner: Runner, names: list[str], batches: int, seed: int) -> dict[str, Tensor]:
    """|w · ∂L/∂w| of parameters, with the gradient averaged over batches and ranks.

    It uses a copy of the model and a loader of its own, and restores the random states, so that it
    does not change the run.

    Args:
        runner: The runner, before its first iteration.
        names: Parameters of the unwrapped model.
        batches: How many batches of the run's training data to use.
        seed: Seed of the order of the data.

    Returns:
        Scores by name, each of its parameter's shape.

    Raises:
        SparseTrainingError: If all scores of a parameter are 0, so that they say nothing about how
            many of its weights to keep.
    """
    model = unwrapped(runner.model)
    with random_states_kept():
        model = copy.deepcopy(model).train()
        model.zero_grad(set_to_none=True)
        for batch in _batches(runner.train_dataloader, batches, seed):
            data = model.data_preprocessor(batch, True)
            loss, _ = model.parse_losses(model._run_forward(data, mode='loss'))
            loss.backward()
    parameters = named_parameters(model)
    scores = {}
    for name in names:
        weight = parameters[name]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        all_reduce(gradient, op='mean')
        scores[name] = snip(weight, gradient)
    # All ranks have the same scores here, so that all of them raise.
    unscored = [name for name, score in scores.items() if not score.any()]
    if unscored:
        more = f' and {len(unscored) - 3} more' if len(unscored) > 3 else ''
        raise SparseTrainingError(
            f'SNIP: all scores |weight × gradient| are 0 in {len(unscored)} of {len(scores)} '
            f'masked tensors ({", ".join(unscored[:3])}{more}): it cannot tell how many of their '
            'weights to keep. Where the last norms of residual blocks start at zero, as those of '
            "OpenMMLab's ResNets do, set zero_init_residual=False in the backbone, start from "
            "pretrained weights, or take init='uniform' or 'erk'. Where one batch does not reach "
            "all layers, take more: init=dict(type='snip', batches=8). Exclude what the loss never "
            'uses'
        )
    return scores


def on_a_batch(runner: Runner, seed: int) -> Callable[[], object]:
    """A function that gives the model's outputs for the first batch of its training data.

    Some models have no loss in eval mode, and some transforms remember earlier samples: the batch
    is loaded once.
    """
    model = unwrapped(runner.model)
    with random_states_kept():
        (batch,) = _batches(runner.train_dataloader, 1, seed)

    def run() -> object:
        with random_states_kept():
            torch.manual_seed(seed)
            data = model.data_preprocessor(copy.deepcopy(batch), False)
            return model._run_forward(data, mode='tensor')

    return run


def _batches(loader: DataLoader, batches: int, seed: int) -> Iterator[dict | tuple]:
    """The first batches of a loader like the run's, which itself stays untouched."""
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    own = DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=DefaultSampler(loader.dataset, shuffle=True, seed=seed),
        collate_fn=loader.collate_fn,
        num_workers=0,
    )
    iterator = iter(own)
    for _ in range(min(batches, len(own))):
        yield next(iterator)
