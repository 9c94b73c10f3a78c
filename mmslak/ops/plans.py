"""What one call computes, which methods compute it, and where measured choices are kept."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmslak.ops.layouts import layout_of

logger = logging.getLogger('mmslak.ops')

TABLES = Path(__file__).with_name('tables')  # choices of machines that were measured, shipped
VERSION = 1  # of the file format
VERSIONS = ('torch', 'source', 'cudnn', 'triton')  # facts in which a shipped table may differ


class Plan(NamedTuple):
    """Names of the methods (`mmslak.ops.methods`) for the output and for both gradients.

    One name stands for all kernels together, several are one per kernel.

    Attributes:
        forward: Of the output.
        input_gradient: Of the gradient of x.
        weight_gradient: Of the gradients of the kernels.
        plain: torch's convolution is called as it is, with its own autograd.
    """

    forward: tuple[str, ...]
    input_gradient: tuple[str, ...] = ()
    weight_gradient: tuple[str, ...] = ()
    plain: bool = False

    def to_json(self) -> list:
        """The plan as lists."""
        return [
            list(self.forward),
            list(self.input_gradient),
            list(self.weight_gradient),
            self.plain,
        ]

    @classmethod
    def from_json(cls, value: list) -> 'Plan':
        """The plan of `to_json`.

        Raises:
            ValueError: If it is none.
        """
        is_plan = isinstance(value, list) and [type(part) for part in value] == [list] * 3 + [bool]
        names = [name for part in value[:3] for name in part] if is_plan else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f'no plan: {value!r}')
        return cls(*map(tuple, value[:3]), value[3])


class Case(NamedTuple):
    """What one call computes, as far as its speed depends on it.

    Attributes:
        device: Of the tensors.
        dtype: Of the tensors.
        layout: NCHW (`torch.contiguous_format`) or NHWC (`torch.channels_last`).
        shape: (N, C, H, W) of x.
        kernels: (height, width) of each.
        summed: Whether the outputs are added up.
        part: 'forward', 'input' (the gradient of x) or 'weight' (those of the kernels) alone;
            'training-x', 'training-w' or 'training-xw' for the output and gradients.
    """

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    shape: tuple[int, ...]
    kernels: tuple[tuple[int, int], ...]
    summed: bool
    part: str = 'forward'

    @classmethod
    def of(
        cls,
        x: Tensor,
        weights: Sequence[Tensor],
        summed: bool,
        input_gradient: bool = False,
        weight_gradient: bool = False,
    ) -> 'Case':
        """The case of a call."""
        kernels = tuple((w.shape[2], w.shape[3]) for w in weights)
        wanted = 'x' * input_gradient + 'w' * weight_gradient
        return cls(
            x.device,
            x.dtype,
            layout_of(x),
            tuple(x.shape),
            kernels,
            summed and len(kernels) > 1,
            f'training-{wanted}' if wanted else 'forward',
        )

    @property
    def map_bytes(self) -> int:
        """Memory of x."""
        return math.prod(self.shape) * torch.empty((), dtype=self.dtype).element_size()

    @property
    def never_ends(self) -> bool:
        """Whether oneDNN may not come back from this convolution in NHWC.

        Seen with torch 2.13 on a CPU with AMX, after 11 minutes in its code generation: 16 bits, 8
        or 16 channels, 15 or more columns, maps from 32 on; here with all maps of their buckets.
        """
        large = max(self.bucket[1:]) >= 32 and max(map(max, self.kernels)) >= 15
        halves = self.dtype in (torch.bfloat16, torch.float16)
        return self.device.type == 'cpu' and halves and large and self.shape[1] <= 16

    @property
    def group(self) -> str:
        """The case without its shape: shapes of a group are near or far from each other."""
        parts = [str(self.dtype).removeprefix('torch.')]
        parts.append('nhwc' if self.layout == torch.channels_last else 'nchw')
        parts.append('+'.join(f'{rows}x{columns}' for rows, columns in self.kernels))
        if len(self.kernels) > 1:
            parts.append('sum' if self.summed else 'branches')
        return f'{" ".join(parts)} {self.part} c{self.shape[1]}'

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Batch, height and width, each rounded up such that few sizes remain."""
        batch, _, height, width = self.shape
        return 1 << (batch - 1).bit_length(), round_size(height), round_size(width)

    @property
    def key(self) -> str:
        """The group and the bucket: cases of one key have one plan."""
        batch, height, width = self.bucket
        return f'{self.group} n{batch} h{height} w{width}'


def round_size(size: int) -> int:
    """A side of a map, up to the next power of two, or one and a half of one."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 and power >= 4 else power


@functools.cache
def facts(device: torch.device, threads: int) -> dict[str, str | int]:
    """What choices depend on beside the case: machine, versions, allocator, settings."""
    values: dict[str, str | int] = dict(torch=torch.__version__, source=_source())
    if device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        values['device'] = f'{torch.cuda.get_device_name(device)}, sm_{major}{minor}'
        values['cudnn'] = f'{torch.backends.cudnn.version()}'
        values['settings'] = (
            f'benchmark={torch.backends.cudnn.benchmark}, tf32={torch.backends.cudnn.allow_tf32}'
        )
        values['triton'] = _triton_version()
    elif device.type == 'cpu':
        values['device'] = f'{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}'
        values['threads'] = threads
        names = ('LD_PRELOAD', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_')
        values['allocator'] = ' '.join(f'{n}={os.environ[n]}' for n in names if n in os.environ)
    else:
        values['device'] = f'{device.type}, {platform.machine()}'
    return values


def cpu_name() -> str:
    """Name of the CPU's model."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, 'sched_getaffinity', None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _triton_version() -> str:
    from importlib import metadata

    try:
        return metadata.version('triton')
    except metadata.PackageNotFoundError:
        return 'none'


def _source() -> str:
    """Of this folder's files: other code can be faster or slower."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob('*.py')):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Where choices are kept: `tuning` in `cache_root()`."""
    return cache_root() / 'tuning'


def cache_root() -> Path:
    """Where mmslak keeps files: `MMSLAK_CACHE`, or a folder in the user's cache."""
    root = os.environ.get('MMSLAK_CACHE')
    if root is None:
        base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        root = Path(base) / 'mmslak'
    return Path(root)


class Store:
    """The plans of one machine and its settings, in a JSON file that processes share.

    Args:
        facts: Of the machine, see `facts`.
        folder: Where files are; None is `cache_folder()`.
    """

    def __init__(self, facts: dict, folder: Path | None = None) -> None:
        self.facts = facts
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f'{name}.json'
        self.plans: dict[str, Plan] = {}
        self.shipped = _shipped(facts)
        self._stamp: tuple | None = None
        self._warned = False
        self.load()

    def load(self) -> None:
        """Reads what any process has written since. A file that cannot be read counts as empty."""
        try:
            status = self.path.stat()
            stamp = status.st_mtime_ns, status.st_ino
            if stamp != self._stamp:
                self.plans.update(read_table(self.path)[1])
                self._stamp = stamp
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            self._warn(f'{self.path} cannot be read ({error}); it is written anew')

    def find(self, case: Case) -> Plan | None:
        """The plan of a case's key: this machine's own, or a shipped one."""
        return self.plans.get(case.key) or self.shipped.get(case.key)

    def nearest(self, case: Case) -> Plan | None:
        """The plan of the case's group whose bucket is nearest, None if there is none."""
        best, least = None, math.inf
        for key, plan in (self.shipped | self.plans).items():
            group, *sizes = key.rsplit(' ', 3)
            if group != case.group:
                continue
            other = (int(size[1:]) for size in sizes)
            distance = sum(abs(math.log(a / b)) for a, b in zip(other, case.bucket, strict=True))
            if distance < least:
                best, least = plan, distance
        return best

    def add(self, plans: dict[str, Plan]) -> None:
        """Keeps plans, on disk too where that is possible."""
        self.plans.update(plans)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_suffix('.lock')):
                self._stamp = None
                mine = dict(self.plans)
                self.load()
                self.plans.update(mine)
                write_table(self.path, self.facts, self.plans)
        except OSError as error:
            self._warn(f'measured choices are not kept: {error}')

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning('mmslak.ops: %s', text)


def read_table(path: Path) -> tuple[dict, dict[str, Plan]]:
    """The facts and the plans of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such file, or damaged.
    """
    content = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(content, dict) or content.get('version') != VERSION:
        raise ValueError('another format')
    facts, plans = content.get('facts'), content.get('plans')
    if not isinstance(facts, dict) or not isinstance(plans, dict):
        raise ValueError('facts or plans are missing')
    return facts, {key: Plan.from_json(value) for key, value in plans.items()}


def write_table(path: Path, facts: dict, plans: dict[str, Plan]) -> None:
    """Writes a file for `read_table`, as a whole."""
    rows = [f'    {json.dumps(key)}: {json.dumps(plans[key].to_json())}' for key in sorted(plans)]
    head = f'  "version": {VERSION},\n  "facts": {json.dumps(facts)},\n'
    text = '{\n' + head + '  "plans": {\n' + ',\n'.join(rows) + '\n  }\n}\n'
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'{path.name}.')
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _shipped(facts: dict) -> dict[str, Plan]:
    """Plans of the shipped tables for this machine and its settings, measured with any version."""
    plans: dict[str, Plan] = {}
    for path in sorted(TABLES.glob('*.json')):
        try:
            theirs, found = read_table(path)
        except (OSError, ValueError) as error:
            _warn_once(f'{path} is passed over: {error}')
            continue
        if _without_versions(theirs) == _without_versions(facts):
            plans.update(found)
    return plans


def _without_versions(facts: dict) -> dict:
    return {name: value for name, value in facts.items() if name not in VERSIONS}


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning('mmslak.ops: %s', text)


@contextlib.contextmanager
def locked(path: Path, seconds: float = 120.0) -> Iterator[bool]:
    """Holds the lock of a file or folder that processes of a machine share.

    A process that dies gives its lock back. Where the system has no such locks, there is none.

    Args:
        path: A folder, or a file, which is made if it is missing.
        seconds: How long it waits for another process; then it goes on without the lock.

    Yields:
        False if another process still has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    is_held, end = False, time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, or that is read-only
            flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, flags, 0o666)
            stack.callback(os.close, handle)  # and the lock with it
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_held = False
                    break
                except BlockingIOError:
                    is_held = True
                if time.monotonic() >= end:
                    break
                time.sleep(0.05)
        yield not is_held
