"""Medians of runs taken in turns, and the circumstances that they hold in."""

import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from mmslak.ops.plans import cores, cpu_name

RESULTS = Path(__file__).parent / 'results'

# glibc hands larger buffers than its threshold back at every free; getting them anew can take
# longer than a convolution.
KEEP_BUFFERS = dict(MALLOC_MMAP_THRESHOLD_='4000000000', MALLOC_TRIM_THRESHOLD_='20000000000')

# Instructions of x86 CPUs for bfloat16 and their short names, the newest last.
BFLOAT16 = dict(avx512_bf16='avx512bf16', amx_bf16='amx')

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
        machine=machine(device),
        device=_device(device),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    for name in ('onedl-mmcv', 'mmcv'):
        with suppress(PackageNotFoundError):
            facts.setdefault('mmcv', version(name))
    if device.type == 'cpu':
        facts['instructions'] = ', '.join(_instructions())
        facts['cores'] = cores()
        facts['threads'] = torch.get_num_threads()
        facts['allocator'] = 'large buffers kept' if kept else 'default'
    return facts


def machine(device: torch.device | str = 'cpu') -> str:
    """Short name of a machine, under which its results lie: xeon-amx-2c, h100-80gb-hbm3."""
    device = torch.device(device)
    return short_name(_device(device), _instructions(), cores() if device.type == 'cpu' else 0)


def short_name(device: str, instructions: Sequence[str] = (), cores: int = 0) -> str:
    """Family, the newest instructions that convolutions use, and cores, as a folder's name.

    Args:
        device: Model, for a CPU with torch's capability in brackets behind it.
        instructions: Of `BFLOAT16`.
        cores: 0 for a GPU.
    """
    model, capability = re.fullmatch(r'(.*?)(?: \((\w+)\))?', device).groups()
    words = re.sub(r'\(\w+\)|@.*|\d+-Core|\b(Intel|AMD|NVIDIA|CPU|Processor)\b', ' ', model).split()
    if cores:
        words += [BFLOAT16[instructions[-1]] if instructions else capability or '', f'{cores}c']
    return '-'.join(word.lower() for word in words if word)


def _device(device: torch.device) -> str:
    return _processor() if device.type == 'cpu' else torch.cuda.get_device_name(device)


def _instructions() -> list[str]:
    """What the CPU has for bfloat16, the newest last."""
    info = Path('/proc/cpuinfo')
    flags = set(info.read_text().split()) if info.exists() else set()
    return [name for name in BFLOAT16 if name in flags]


def _processor() -> str:
    return f'{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})'


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


def save(result: dict, path: str | Path | None) -> None:
    """Writes a result as JSON, if there is a path for it."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rounded(result), indent=2, ensure_ascii=False) + '\n')
