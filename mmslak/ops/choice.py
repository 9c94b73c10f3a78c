"""Which methods compute a call of 'auto': what was measured here to be fastest, or a fixed rule."""

import atexit
import hashlib
import math
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from mmslak.ops import tuner
from mmslak.ops.methods import METHODS
from mmslak.ops.plans import Case, Plan, Store, facts, locked, logger
from mmslak.ops.rule import rule

MODES = ('on', 'read', 'off')
VARIABLE = 'MMSLAK_TUNING'
MOST = 10_000  # calls that are remembered: a network may see shapes without end

_mode: str | None = None
_budget = 60.0  # seconds that a process may spend on measuring
_plans: dict[tuple, Plan] = {}  # by all that a call depends on, to be found in a microsecond
plain_calls: set[tuple] = set()  # calls of `depthwise_conv2d` that torch's own convolution computes
_used: dict[str, Plan] = {}  # by key: what this process computes with
_makeshift: set[str] = set()  # keys of those that could not be measured when they came
_restored: dict[str, Plan] = {}  # of the run that is resumed
_process = os.urandom(8).hex()
_state = _process  # another one with every mode and budget, and with other restored choices
_stores: dict[tuple, Store] = {}
_spent = 0.0
_measured = 0
_told = 0  # of those measured, how many a line in the log has told of
_end: float | None = None  # when the time for the case that is measured, and its parts, is over
_lock = threading.RLock()


class tuning:  # noqa: N801, as torch.no_grad
    """Sets how 'auto' chooses, from now on or for a `with` block.

    Args:
        mode: 'on' measures a case when it comes for the first time, and keeps the result on disk
            (the default). 'read' takes what was measured before and measures nothing. 'off' goes
            by a fixed rule, which knows device, dtype and shape alone. The environment variable
            `MMSLAK_TUNING` sets the mode that a process begins with.
        seconds: What a process may spend on measuring in all, 60 s otherwise.

    Raises:
        ValueError: On an unknown mode.
    """

    def __init__(self, mode: str, seconds: float | None = None) -> None:
        global _mode, _budget
        if mode not in MODES:
            raise ValueError(f'tuning: expected one of {", ".join(MODES)}, got {mode!r}')
        self._before = _mode, _budget
        _mode, _budget = mode, _budget if seconds is None else seconds
        _changed()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _mode, _budget
        _mode, _budget = self._before
        _changed()


def tuning_mode() -> str:
    """'on', 'read' or 'off'.

    Raises:
        ValueError: If the environment variable has another value.
    """
    global _mode
    if _mode is None:
        value = os.environ.get(VARIABLE, 'on').lower()
        if value not in MODES:
            raise ValueError(f'{VARIABLE}: expected one of {", ".join(MODES)}, got {value!r}')
        _mode = value
    return _mode


def spent() -> tuple[int, float]:
    """Cases that this process has measured, and the seconds that this took."""
    return _measured, _spent


def choices() -> dict[str, list]:
    """The plans that this process computes with, as plain lists, for `restore_choices`."""
    return {key: plan.to_json() for key, plan in _used.items()}


def restore_choices(saved: dict[str, list]) -> None:
    """Computes with the plans of another process from now on, whatever is measured or on disk.

    A resumed run is the same to the bit only if it computes by the same methods.

    Raises:
        ValueError: If an entry is not a plan.
    """
    plans = {str(key): Plan.from_json(value) for key, value in saved.items()}
    with _lock:
        _restored.update(plans)
        _used.clear()
        _changed()


def state() -> str:
    """Changes when other choices may hold: a graph is compiled for one of its values.

    It is another one in each process, since choices of a graph on disk are not in `choices()`.
    """
    return _state


def _changed() -> None:
    """Other choices hold from now on."""
    global _state
    restored = hashlib.sha256(repr(sorted(_restored.items())).encode()).hexdigest()[:12]
    _state = f'{_process} {_mode} {_budget} {restored}'
    _forget()


def _forget() -> None:
    """Every call is looked up anew."""
    _plans.clear()
    plain_calls.clear()


def choose(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    summed: bool,
    input_gradient: bool = False,
    weight_gradient: bool = False,
    call: tuple | None = None,
) -> Plan:
    """The methods for a call.

    Args:
        backend: One of `mmslak.ops.BACKENDS`.
        x: (N, C, H, W).
        weights: Kernels (C, 1, kH, kW).
        summed: Whether the outputs are added up.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradient: Whether those of the kernels are wanted.
        call: What the caller will look for in `plain_calls`.
    """
    if x.shape[0] == 0:
        return Plan(('conv',), ('conv',), ('conv',), plain=True)
    if backend != 'auto':
        return Plan((backend,), (backend,), (backend,))
    threads = torch.get_num_threads()
    key = (
        x.shape, x.stride(), x.dtype, x.device, *(weight.shape for weight in weights),
        summed, input_gradient, weight_gradient, threads,
    )  # fmt: skip
    plan, final = _plans.get(key), True
    if plan is None:
        case = Case.of(x, weights, summed, input_gradient, weight_gradient)
        if tuning_mode() == 'off':
            plan = rule(case)
        else:
            plan, final = _find(case, threads)
        if final:
            if len(_plans) > MOST:
                _plans.clear()
            _plans[key] = plan
    if call is not None and plan.plain and final:
        if len(plain_calls) > MOST:
            plain_calls.clear()
        plain_calls.add(call)
    return plan


def _find(case: Case, threads: int) -> tuple[Plan, bool]:
    """The plan of a case, and whether it is the one of all later calls, too."""
    facts_of_case = facts(case.device, threads)
    name = (case.device, *facts_of_case.values())
    with _lock:
        if name not in _stores:
            _stores[name] = Store(facts_of_case)
        store = _stores[name]
        key = f'{store.path.stem}: {case.key}'
        capturing = case.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        may_measure = tuning_mode() == 'on' and _spent < _budget and not capturing
        may_measure = may_measure and not torch.are_deterministic_algorithms_enabled()
        if may_measure and key in _makeshift:
            _makeshift.remove(key)
            _used.pop(key, None)
            _forget()
        plan = _used.get(key) or _known(_restored.get(key)) or _known(store.find(case))
        if plan is None and may_measure:
            plan = _measure(case, store, threads)
        elif plan is None:
            _makeshift.add(key)
        if plan is None and not case.never_ends:
            plan = _known(store.nearest(case))
        plan = plan or rule(case)
        if not capturing:
            _used[key] = plan
        return plan, not capturing


def _measure(case: Case, store: Store, threads: int) -> Plan | None:
    """Measures a case, unless another process does so at this moment: then its result counts."""
    global _measured, _spent, _end
    # A lock of its own: while a case is measured, others that it is put together from are.
    digest = hashlib.sha256(case.key.encode()).hexdigest()[:12]
    with locked(store.path.with_name(f'{store.path.stem}-{digest}.lock')):
        store.load()
        plan = _known(store.find(case))
        if plan is not None:
            return plan
        if not _measured and _end is None:
            logger.warning(
                'mmslak.ops: measuring which convolutions are fast here (once for each shape '
                'and number of threads, %s; to %s). '
                'Beforehand: mmslak tune CONFIG --shape N C H W; never: %s=off',
                'without a limit' if _budget == math.inf else f'at most {_budget:g} s',
                store.path.parent,
                VARIABLE,
            )
            atexit.register(tell_measured)
        start, outermost = time.monotonic(), _end is None
        if outermost:
            _end = start + _budget - _spent
        try:
            plan = tuner.measure(case, lambda part: _find(part, threads)[0], _end)
        finally:
            if outermost:
                _spent, _end = _spent + time.monotonic() - start, None
        _measured += 1
        if plan is not None:
            store.add({case.key: plan})
        if outermost and _spent >= _budget:
            tell_measured()
        return plan


def tell_measured() -> None:
    """Logs what this process has measured so far, if that is new; also done at its end."""
    global _told
    if _measured > _told:
        _told = _measured
        cases = 'case' if _measured == 1 else 'cases'
        logger.warning('mmslak.ops: measured %d %s in %.1f s so far', _measured, cases, _spent)


def _known(plan: Plan | None) -> Plan | None:
    """The plan, unless another version made it, of methods that this one does not have."""
    names = {name for part in plan[:3] for name in part} if plan else set()
    return plan if names <= METHODS.keys() else None
