"""Prune rate over the run: callables of the number of optimizer steps done."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(start: float, end: float | None = None, steps: int | None = None) -> Schedule:
    """The same rate for ever; ``end`` and ``steps`` are ignored, so that all schedules are built
    alike.

    Raises:
        ValueError: ``start`` is outside [0, 1].
    """
    _check_rate('start', start)
    return lambda step: start


def linear(start: float, end: float, steps: int) -> Schedule:
    """start + (end - start) t / T, held at ``end`` after T = ``steps`` steps.

    Raises:
        ValueError: A rate is outside [0, 1] or ``steps`` is below 1.
    """
    _check(start, end, steps)
    return lambda step: start + (end - start) * _progress(step, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """end + (start - end)(1 + cos(πt/T)) / 2, held at ``end`` after T = ``steps`` steps.

    Source: SLaK's prune-rate decay, CosineAnnealingLR(T_max, eta_min=0.005), in closed form.

    Raises:
        ValueError: A rate is outside [0, 1] or ``steps`` is below 1.
    """
    _check(start, end, steps)
    return lambda step: (end + (start - end) * (1 + math.cos(math.pi * _progress(step, steps))) / 2)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    'constant': constant,
    'linear': linear,
    'cosine': cosine,
}


def _progress(step: int, steps: int) -> float:
    return min(step, steps) / steps


def _check(start: float, end: float, steps: int) -> None:
    _check_rate('start', start)
    _check_rate('end', end)
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f'{name} must be in [0, 1], got {rate}')
