"""What is computed from weights and statistics alone is kept from one forward to the next."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mmslak.ops import is_compiling, is_transformed

T = TypeVar('T')


class KeepsFused(nn.Module):
    """Base of large kernels, whose fused kernels are kept while their sources stay as they are.

    A change is seen by the identity, version and memory of the sources, on a CPU by their values
    too. On a GPU, comparing values would stop the queue: what is written through `.data` there is
    seen after the next `train()` or `eval()`, which MMEngine's loops call after EMAHook has
    exchanged the weights. A copy and a pickle of the module begin without.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: _Kept | None = None

    def keep(self, sources: Sequence[object], compute: Callable[[], T]) -> T:
        """Returns `compute()`, or what it returned last time if no source has changed since.

        Nothing is kept while gradients of the sources are wanted or there, nor while a graph is
        traced, captured or transformed.

        Args:
            sources: All that `compute` reads: tensors, and values that are compared by ==.
            compute: Makes tensors of them.
        """
        tensors = [source for source in sources if isinstance(source, Tensor)]
        if not _can_keep(tensors):
            self._kept = None  # fused optimizers write what they have gradients of without a trace
            return compute()
        if tensors[0].is_cuda:  # what one stream has computed, another one may read too early
            sources = [*sources, torch.cuda.current_stream(tensors[0].device)]
        kept = self._kept
        if kept is None or not kept.is_made_of(sources):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = _Kept(sources, compute())
        return kept.value

    def train(self, mode: bool = True) -> 'KeepsFused':
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_kept': None}


class _Kept:
    """A value and what it was made of."""

    def __init__(self, sources: Sequence[object], value: object) -> None:
        self.sources, self.value = sources, value
        self.states = [_state(s) if isinstance(s, Tensor) else None for s in sources]

    def is_made_of(self, sources: Sequence[object]) -> bool:
        """Whether the sources are those of then and have not changed."""
        return len(sources) == len(self.sources) and all(
            source is before and _is_in_state(source, *state)
            if isinstance(source, Tensor)
            else source == before
            for source, before, state in zip(sources, self.sources, self.states, strict=True)
        )


def _state(tensor: Tensor) -> tuple[int, Tensor]:
    """Version and content; on a GPU the memory itself, which nothing else can get meanwhile."""
    content = tensor.detach()
    return tensor._version, content.clone() if _by_value(tensor) else content


def _is_in_state(tensor: Tensor, version: int, content: Tensor) -> bool:
    if tensor._version != version or tensor.dtype != content.dtype:
        return False
    if tensor.device != content.device:
        return False
    if not _by_value(tensor):
        return tensor.is_set_to(content)
    if tensor.dtype != torch.float32 or tensor.numel() < 10000:
        return torch.equal(tensor, content)
    # torch.equal takes one number after the other, 5 times as long as NumPy.
    return np.array_equal(tensor.detach().numpy(), content.numpy())


def _by_value(tensor: Tensor) -> bool:
    return tensor.device.type == 'cpu'


def _can_keep(tensors: Sequence[Tensor]) -> bool:
    if is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if is_transformed():
        return False
    if any(t.requires_grad for t in tensors) and (
        torch.is_grad_enabled() or any(t.is_leaf and t.grad is not None for t in tensors)
    ):
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() or t.is_meta for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
