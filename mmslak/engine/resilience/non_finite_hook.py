"""Stops at the first number that is none, and says where it came from."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmslak.engine.resilience.random_states import random_states, restore_random_states
from mmslak.engine.resilience.running import is_running
from mmslak.errors import UserError
from mmslak.fileio.atomic import AtomicBackend
from mmslak.registry import HOOKS


class NonFiniteError(UserError):
    """A loss or gradient is infinite or not a number; the message says where it arose."""

    of_one_process = True


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops training at the first non-finite loss or gradient, before the optimizer uses it.

    The loss is looked at before the backward pass, gradients before they are clipped or, without
    clipping, when the optimizer is about to step. A step that a GradScaler skips for an overflow is
    no alarm; a non-finite loss is one under AMP too. At an alarm batch, weights, optimizer and
    random states are saved as `non_finite_rank0.pth` in the work folder: tensors and plain values.
    Then the iteration is repeated with its random numbers, and the innermost module that makes
    something non-finite of finite inputs is named, in the file too. Each rank repeats its own part
    alone, with batch norms that do not synchronise.

    In the normal case it costs one pass over the gradients.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._handles: list = []
        self._replaced: list[tuple[OptimWrapper, str, Callable]] = []
        self._data: object = None
        self._random: dict | None = None
        self._looked = False  # at the gradients of the coming step, before they were clipped
        self._failed = False  # the check itself

    def before_train(self, runner: Runner) -> None:
        """Listens to the optimizer and to what the model gets."""
        self._release()
        self._runner = runner
        model = _unwrapped(runner)
        if hasattr(model, 'data_preprocessor'):
            self._handles.append(model.data_preprocessor.register_forward_hook(self._keep))
        wrapper = runner.optim_wrapper
        for one in getattr(wrapper, 'optim_wrappers', {'': wrapper}).values():
            hook = torch.compiler.disable(self._before_step)
            self._handles.append(one.optimizer.register_step_pre_hook(hook))
            self._replace(one, 'update_params', self._checked(one.update_params))
            self._replace(one, '_clip_grad', self._before_clipping(one))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keeps the random states that the iteration starts with."""
        self._random = random_states()

    def after_train(self, runner: Runner) -> None:
        """Stops listening."""
        self._release()

    def _replace(self, wrapper: OptimWrapper, name: str, function: Callable) -> None:
        setattr(wrapper, name, function)
        self._replaced.append((wrapper, name, function))

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for wrapper, name, function in self._replaced:
            if vars(wrapper).get(name) is function:  # not what another run's hook put around it
                delattr(wrapper, name)
        self._handles, self._replaced, self._data = [], [], None
        self._looked = False

    def _listens(self) -> bool:
        """Whether the run goes on; one that has raised leaves the listeners where they are."""
        return is_running(self._runner.train_loop)

    def _keep(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module.training and self._listens():
            self._data = output

    def _checked(self, update_params: Callable) -> Callable:
        """An optimizer wrapper's update that looks at the loss first."""

        def checked(loss: Tensor, *args, **kwargs) -> None:
            if not self._listens():
                self._release()
            elif not self._passes([loss]):
                self._alarm('loss')
            update_params(loss, *args, **kwargs)

        return checked

    def _before_clipping(self, wrapper: OptimWrapper) -> Callable:
        """An optimizer wrapper's clipping, which makes infinity the clip value; looks first."""
        clip = wrapper._clip_grad

        def checked() -> None:
            scaler = getattr(wrapper, 'loss_scaler', None)
            # A scaler looks by itself, while it unscales, and skips the step. Apex does, too.
            scaled = scaler is not None and scaler.is_enabled()
            if not scaled and not hasattr(wrapper.optimizer, '_amp_stash') and self._listens():
                self._look(wrapper.optimizer)
                self._looked = True
            clip()

        return checked

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        found = getattr(optimizer, 'found_inf', None)  # a fused optimizer under a GradScaler
        looked, self._looked = self._looked, False
        if not looked and (found is None or not bool(found)) and self._listens():
            self._look(optimizer)

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [
            p.grad.to_local() if hasattr(p.grad, 'to_local') else p.grad
            for group in optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        ]
        if not self._passes(gradients):
            self._alarm('gradient')

    def _passes(self, tensors: list[Tensor]) -> bool:
        """Whether all are finite, or cannot be checked, which is told of once."""
        try:
            return _finite(tensors)
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._runner.logger.warning(
                    'Losses or gradients are not checked for being finite, since the check ended '
                    f'with {type(error).__name__}: {error}'
                )
            return True

    # ------------------------------------------------------------------ the alarm

    def _alarm(self, what: str) -> None:
        runner, model = self._runner, _unwrapped(self._runner)
        path = Path(runner.work_dir, f'non_finite_rank{get_rank()}.pth')
        report = dict(
            what=what,
            iteration=runner.iter + 1,
            batch=plain(self._data),
            random=self._random,
            state_dict=model.state_dict(),
            optimizer=runner.optim_wrapper.state_dict(),
        )
        self._save(report, path)  # first: the repetition may not come back
        try:
            with _buffers_kept(model), _alone():
                place = self._find(model, what)
        except Exception as error:  # whatever a model raises; the alarm is what is to be told
            place = (
                f'where is unknown, since repeating it ended with {type(error).__name__}: {error}'
            )
        self._save(dict(report, place=place), path)
        pictures = [p for p in _paths(report['batch']) if p]
        of = f', pictures {", ".join(pictures[:4])}' if pictures else ''
        raise NonFiniteError(
            f'non-finite {what} in iteration {runner.iter + 1}: {place}{of}; '
            f'batch and state are in {path}'
        )

    def _save(self, report: dict, path: Path) -> None:
        with io.BytesIO() as buffer:
            torch.save(report, buffer)
            AtomicBackend().put(buffer.getvalue(), path)

    def _find(self, model: nn.Module, what: str) -> str:
        """Repeats the iteration and says where the first non-finite number comes from."""
        for kind, tensors in (
            ('weight', model.named_parameters()),
            ('input', _tensors(self._data)),
        ):
            for name, tensor in tensors:
                if not _finite([tensor]):
                    return f'{kind} {name} is not finite'
        if self._data is None:
            return 'the model has no data_preprocessor, by which its input is known'
        watch = _Watch(model)
        kept = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        amp = hasattr(self._runner.optim_wrapper, 'loss_scaler')
        restore_random_states(self._random)
        try:
            with autocast(enabled=amp), watch:
                data = self._data
                losses = (
                    model(**data, mode='loss')
                    if isinstance(data, dict)
                    else model(*data, mode='loss')
                )
                loss, _ = model.parse_losses(losses)
                # After an alarm of the loss, DDP still waits for a backward pass to share.
                if what == 'gradient' and watch.forward is None:
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
            if gradient is not None and not _finite([gradient]):
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
    other ranks.
    """
    before = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = before


class _Watch:
    """Notes where a forward, and a backward, pass first makes something non-finite of finite input.

    Forward, that is the innermost module: what it computes by itself shows at its end, or in the
    input of a module that it calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._handles = model, []
        self.forward: str | None = None
        self._inside: list[str] = []  # modules whose forward pass goes on
        self._gradients: list[tuple[str, bool, bool]] = []  # module, of its output, finite

    def __enter__(self) -> '_Watch':
        for name, module in self._model.named_modules():
            said = f'{name} ({type(module).__name__})' if name else type(module).__name__
            # The model's own output is the loss.
            hooks = self._before(said), self._after(said, is_model=not name)
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
        for _, tensor in _tensors(values):
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda g: self._gradients.append((name, of_output, _finite([g])))
                )

    def _before(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # Masks may be infinite on purpose; they have no gradient. Recomputed parts have none.
            values = [
                tensor
                for _, tensor in _tensors((args, kwargs))
                if tensor.requires_grad or not torch.is_grad_enabled()
            ]
            if self.forward is None and self._inside and not _finite(values):
                self.forward = f'the forward of {self._inside[-1]}, before {name}'
            self._inside.append(name)
            if not list(module.children()):
                self._listen(name, (args, kwargs), False)

        return hook

    def _after(self, name: str, is_model: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            while self._inside.pop() != name:
                pass  # one that ended with an error, which was caught
            found = not _finite([t for _, t in _tensors(output)])
            if self.forward is None and found and not is_model:
                self.forward = name
            if not list(module.children()):
                self._listen(name, output, True)

        return hook


def _unwrapped(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are; by one norm, and number by number only where that is not finite."""
    tensors = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    tensors = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors, 1)
    if bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _tensors(value: object, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) in nested containers and data samples."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f'{name}.{key}'.lstrip('.'))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(part, f'{name}.{index}'.lstrip('.'))
    elif isinstance(value, BaseDataElement):
        yield from _tensors(dict(value.items()), name)


def plain(value: object) -> object:
    """Data samples and what is in them as dicts, tensors and plain values."""
    if isinstance(value, BaseDataElement):
        fields = {key: plain(part) for key, part in value.items()}
        return dict(type=type(value).__name__, metainfo=plain(value.metainfo), **fields)
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biufc':
        return torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(getattr(value, 'masks', None), np.ndarray):  # mmdet's bitmap masks
        return plain(value.masks)
    if isinstance(getattr(value, 'tensor', None), Tensor):  # mmdet's boxes
        return plain(value.tensor)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def _paths(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key == 'img_path' and isinstance(part, str):
                yield part
            else:
                yield from _paths(part)
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part)
