"""Stops training at the first non-finite loss or gradient and names where it arose."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.nn.utils import clip_grad_value_

from mmslak.engine.resilience.non_finite_origin import all_finite, find_origin
from mmslak.engine.resilience.random_states import random_states
from mmslak.engine.resilience.running import is_running
from mmslak.engine.snip import unwrapped
from mmslak.errors import UserError
from mmslak.fileio.atomic import AtomicBackend
from mmslak.registry import HOOKS


class NonFiniteError(UserError):
    """A loss or gradient is infinite or not a number; the message says where it arose."""

    of_one_process = True


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops training at the first non-finite loss or gradient, before the optimizer uses it.

    The loss is checked when the model has computed it, gradients when the optimizer is about to
    step, and before they are clipped by value, which would make infinity a number. A step that a
    GradScaler skips for an overflow is no alarm; a non-finite loss is one under AMP too. At an
    alarm batch, weights, optimizer and random states are saved as `non_finite_rank0.pth` in the
    work folder: tensors and plain values. Then the iteration is repeated with its random numbers,
    and the innermost module that makes something non-finite of finite inputs is named, in the file
    too. Each rank repeats its own part alone, with batch norms that do not synchronise.

    In the normal case it costs one pass over the gradients.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._handles: list = []
        self._clipping: list[OptimWrapper] = []
        self._data: dict | tuple | None = None  # what the model got last
        self._random: dict | None = None
        self._failed = False  # the check itself

    def before_train(self, runner: Runner) -> None:
        """Listens to the model and to the optimizer."""
        self._release()
        self._runner = runner
        self._handles.append(
            unwrapped(runner.model).register_forward_hook(
                torch.compiler.disable(self._after_forward), with_kwargs=True
            )
        )
        before_step = torch.compiler.disable(self._before_step)
        wrapper = runner.optim_wrapper
        for one in getattr(wrapper, 'optim_wrappers', {'': wrapper}).values():
            self._handles.append(one.optimizer.register_step_pre_hook(before_step))
            if getattr(one, 'grad_name', None) == 'grad_value':
                # MMEngine has no event between the backward pass and clipping.
                one.clip_func = partial(self._clip_by_value, one)
                self._clipping.append(one)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keeps the random states that the iteration starts with."""
        self._random = random_states()

    def after_train(self, runner: Runner) -> None:
        """Stops listening."""
        self._release()

    def _release(self) -> None:
        self._stop_listening()
        self._data = None

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        for wrapper in self._clipping:
            if getattr(wrapper.clip_func, 'func', None) == self._clip_by_value:
                wrapper.clip_func = clip_grad_value_
        self._handles, self._clipping = [], []

    def _listens(self) -> bool:
        """Whether the run goes on; one that has raised leaves the listeners where they are."""
        return is_running(self._runner.train_loop)

    def _after_forward(self, model: BaseModel, args: tuple, kwargs: dict, output: object) -> None:
        if kwargs.get('mode') != 'loss' or not isinstance(output, dict):
            return
        if not self._listens():
            self._release()
            return
        self._data = args or {name: value for name, value in kwargs.items() if name != 'mode'}
        with torch.no_grad():
            loss, _ = model.parse_losses(output)
        if not self._passes([loss]):
            self._alarm('loss')

    def _clip_by_value(self, wrapper: OptimWrapper, parameters: list[Tensor], **options) -> None:
        scaler = getattr(wrapper, 'loss_scaler', None)
        # A scaler looks by itself, while it unscales, and skips the step. Apex does, too.
        scaled = scaler is not None and scaler.is_enabled()
        if not scaled and not hasattr(wrapper.optimizer, '_amp_stash') and self._listens():
            self._look(wrapper.optimizer)
        clip_grad_value_(parameters, **options)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        found = getattr(optimizer, 'found_inf', None)  # a fused optimizer under a GradScaler
        if (found is None or not bool(found)) and self._listens():
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
            return all_finite(tensors)
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
        runner, model = self._runner, unwrapped(self._runner.model)
        self._stop_listening()  # to the repetition
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
        amp = hasattr(runner.optim_wrapper, 'loss_scaler')
        try:
            place = find_origin(model, self._data, self._random, amp, what == 'gradient')
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
