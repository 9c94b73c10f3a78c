"""Where the first non-finite number of an iteration comes from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.model import BaseModel
from mmengine.runner.amp import autocast
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmslak.engine.resilience.random_states import restore_random_states


def find_origin(
    model: BaseModel, data: dict | tuple | None, random: dict, amp: bool, backward: bool
) -> str:
    """Repeats a pass and says where the first non-finite number arises.

    Args:
        model: The model without wrappers, in training mode. Its buffers and gradients stay as they
            are.
        data: What the model gets; None if that is unknown.
        random: The random states that the pass starts with.
        amp: Whether to repeat it in mixed precision.
        backward: Whether the backward pass is repeated, too.

    Returns:
        The place in words, for a message.
    """
    for kind, tensors in (('weight', model.named_parameters()), ('input', named_tensors(data))):
        for name, tensor in tensors:
            if not all_finite([tensor]):
                return f'{kind} {name} is not finite'
    if data is None:
        return "where is unknown, since nothing has called the model with mode='loss'"
    watch = _Watch(model)
    kept = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    restore_random_states(random)
    try:
        with _buffers_kept(model), _alone(), autocast(enabled=amp), watch:
            loss, _ = model.parse_losses(model._run_forward(data, mode='loss'))
            # After an alarm of the loss, DDP still waits for a backward pass to share.
            if backward and watch.forward is None:
                loss.backward()
    finally:
        gradients = {n: p.grad for n, p in model.named_parameters()}
        for parameter, gradient in zip(model.parameters(), kept):
            parameter.grad = gradient
    if watch.forward is not None:
        return f'it first arises in {watch.forward}'
    if not bool(torch.isfinite(loss)):
        return 'it first arises outside of modules, in the loss'
    if watch.backward() is not None:
        return f'it first arises in the backward pass of {watch.backward()}'
    for name, gradient in gradients.items():
        if gradient is not None and not all_finite([gradient]):
            return f'it first arises in the gradient of {name}'
    return 'not on this rank, or not when repeated (accumulated from an earlier batch?)'


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leaves statistics of batch norms as they were."""
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, before in zip(model.buffers(), kept):
            buffer.copy_(before)


@contextmanager
def _alone() -> Iterator[None]:
    """One rank of several computes without the others, which do not take part in a repetition.

    SyncBatchNorm, MMEngine's functions and the heads of MMDetection ask this before they wait for
    other ranks, and torch has no other way to tell all of them.
    """
    before = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = before


class _Watch:
    """Notes the innermost module in which a pass makes something non-finite of finite inputs.

    What a module computes by itself shows in its output, or in the input of a module that it calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._handles = model, []
        self.forward: str | None = None
        self._inside: list[str] = []  # modules whose forward pass goes on
        self._gradients: list[tuple[str, bool, bool]] = []  # module, of its output, finite

    def __enter__(self) -> '_Watch':
        for name, module in self._model.named_modules():
            label = f'{name} ({type(module).__name__})' if name else type(module).__name__
            # The model's own output is the loss.
            hooks = self._before(label), self._after(label, is_model=not name)
            self._handles += [
                module.register_forward_pre_hook(hooks[0], with_kwargs=True),
                module.register_forward_hook(hooks[1]),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self) -> str | None:
        """The module, once the backward pass is over."""
        for name, of_output, finite in self._gradients:
            if not finite:
                return f'what uses {name}' if of_output else name
        return None

    def _listen(self, name: str, values: object, of_output: bool) -> None:
        for _, tensor in named_tensors(values):
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda g: self._gradients.append((name, of_output, all_finite([g])))
                )

    def _before(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # Masks may be infinite on purpose; they have no gradient. Recomputed parts have none.
            values = [
                tensor
                for _, tensor in named_tensors((args, kwargs))
                if tensor.requires_grad or not torch.is_grad_enabled()
            ]
            if self.forward is None and self._inside and not all_finite(values):
                self.forward = f'the forward of {self._inside[-1]}, before {name}'
            self._inside.append(name)
            if not list(module.children()):
                self._listen(name, (args, kwargs), False)

        return hook

    def _after(self, name: str, is_model: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            while self._inside.pop() != name:
                pass  # one that ended with an error, which was caught
            found = not all_finite([t for _, t in named_tensors(output)])
            if self.forward is None and found and not is_model:
                self.forward = name
            if not list(module.children()):
                self._listen(name, output, True)

        return hook


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite: by one norm, and one by one only if the norm is not."""
    tensors = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    tensors = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors, 1)
    if bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def named_tensors(value: object, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) in nested containers and data samples."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from named_tensors(part, f'{name}.{key}'.lstrip('.'))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from named_tensors(part, f'{name}.{index}'.lstrip('.'))
    elif isinstance(value, BaseDataElement):
        yield from named_tensors(dict(value.items()), name)
