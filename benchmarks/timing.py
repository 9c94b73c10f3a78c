"""Medians of runs taken in turns, and the circumstances that they hold in."""

import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import mmcv
import torch

# glibc hands larger buffers than its threshold back at every free; getting them anew can take
# longer than a convolution.
KEEP_BUFFERS = dict(MALLOC_MMAP_THRESHOLD_='4000000000', MALLOC_TRIM_THRESHOLD_='20000000000')

# Seconds below which a call is repeated to time it: what ran before has emptied the caches of it.
SHORT = 0.05

Key = TypeVar('Key', bound=Hashable)


def use_allocator(keep_buffers: bool) -> None:
    """Starts the script anew unless its allocator already keeps large buffers, or does not.

    glibc reads its settings when a process starts.
    """
    others = {name: value for name, value in os.environ.items() if name not in KEEP_BUFFERS}
    wanted = others | KEEP_BUFFERS if keep_buffers else others
    if dict(os.environ) != wanted:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, wanted)


def environment(device: torch.device | str = 'cpu') -> dict[str, str | int]:
    """Device, versions, threads and allocator."""
    device = torch.device(device)
    kept = all(os.environ.get(name) == value for name, value in KEEP_BUFFERS.items())
    facts = dict(
        device=_processor() if device.type == 'cpu' else torch.cuda.get_device_name(device),
        python=platform.python_version(),
        torch=torch.__version__,
        mmcv=mmcv.__version__,
    )
    if device.type == 'cpu':
        facts['threads'] = torch.get_num_threads()
        facts['allocator'] = 'large buffers kept' if kept else 'default'
    return facts


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', info.read_text()) if info.exists() else []
    name = names[0] if names else platform.machine()
    return f'{name} ({torch.backends.cpu.get_cpu_capability()})'


def medians(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device | str = 'cpu',
    rounds: int = 9,
    budget: float = 2.0,
    slow: float = math.inf,
) -> dict[Key, float]:
    """Median milliseconds of every call.

    The calls take turns, so that a slow spell of the machine hits all of them alike. Of short ones
    on the CPU, the second run of each turn counts.

    Args:
        calls: What to time, by name.
        device: Where they run.
        rounds: Timed runs of each call, after one to warm up.
        budget: Seconds that each call may take in all: slower calls get fewer runs, though no fewer
            than three (or `rounds`).
        slow: Seconds of the first run above which it counts and is the only one.
    """
    seconds = _cuda_seconds if torch.device(device).type == 'cuda' else _seconds
    first, times, runs = {}, {}, {}
    for name, call in calls.items():
        if seconds is _cuda_seconds:
            call()  # compiles kernels
        first[name] = seconds(call)
        affordable = max(3, int(budget / first[name]))
        runs[name] = 0 if first[name] > slow else min(rounds, affordable)
        times[name] = [] if runs[name] else [first[name]]
    for turn in range(max(runs.values(), default=0)):
        for name, call in calls.items():
            if turn < runs[name]:
                if seconds is _seconds and first[name] < SHORT:
                    call()
                times[name].append(seconds(call))
    return {name: 1e3 * statistics.median(several) for name, several in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    """Time on the device, from a cold cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(1 << 28, dtype=torch.uint8, device='cuda').zero_()
    # The device waits while the host puts all the work into its queue: launches cost no time then,
    # as in training, where the host is ahead.
    torch.cuda._sleep(20_000_000)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def rounded(value):
    """Numbers of nested dicts and lists to four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f'{value:.4g}') if isinstance(value, float) else value


def print_targets(targets: list[dict]) -> None:
    """One line for each: case, operation, target, value and whether it is met."""
    for t in targets:
        state = 'met' if t['met'] else 'MISSED'
        print(f'{state}: {t["case"]}, {t["operation"]}, {t["target"]}: {t["value"]:.2f}')


def save(result: dict, path: str | None) -> None:
    """Writes a result as JSON, if there is a path for it."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rounded(result), indent=2, ensure_ascii=False) + '\n')
