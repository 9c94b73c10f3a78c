"""Pickles, read as data: nothing of them is run.

A checkpoint is a pickle, and a pickle is a program that may call any function by its name. Here a
name stands for a function of `MAKERS`, for an inert `Foreign` record, or for an error. The sizes
that a pickle declares are compared with the bytes that there are before memory is allocated.
"""

import collections
import math
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, UntypedStorage, nn

MAX_DEPTH = 200  # levels of containers; what copies or compares them later is recursive
MAX_COPIED = 10  # values and bytes that calls may copy, for each byte of the file
# Functions and classes that become records if MAKERS lacks them. They hold no weights.
INERT = re.compile(
    r'(argparse|collections|mmengine|mmcv|mmdet|mmseg|mmpretrain|mmcls|numpy|pathlib)\..*|'
    r'builtins\.(getattr|list|dict|int|float|str|tuple|object)'
)
# Instructions that Python's own unpickler does for us: they call nothing and hash nothing.
SAFE = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE
SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST LIST APPEND APPENDS
EMPTY_DICT EMPTY_SET PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL
BINPERSID
"""
STORAGES = {
    **dict(DoubleStorage=torch.float64, FloatStorage=torch.float32, HalfStorage=torch.float16),
    **dict(BFloat16Storage=torch.bfloat16, LongStorage=torch.int64, IntStorage=torch.int32),
    **dict(ShortStorage=torch.int16, CharStorage=torch.int8, ByteStorage=torch.uint8),
    **dict(BoolStorage=torch.bool, ComplexFloatStorage=torch.complex64),
    **dict(ComplexDoubleStorage=torch.complex128, UntypedStorage=torch.uint8),
}
KEYS = (str, bytes, int, float, complex, np.generic, Path, type(None))  # and tuples of these
SIZED = (str, bytes, bytearray, list, tuple, dict)


class RefusedError(ValueError):
    """The file asks for code to be run, or for more memory than it has bytes."""


@dataclass(frozen=True)
class Foreign:
    """The name of a function or object that is not rebuilt. Dicts leave such values out.

    A scheduler's state, for example, has functions that the new scheduler has already.
    """

    name: str

    def extend(self, values: list) -> None:
        """Drops elements."""

    append = extend


@dataclass(frozen=True)
class Storage:
    """Bytes of tensors and the type of their numbers."""

    dtype: torch.dtype
    data: UntypedStorage


class Unpickler(pickle._Unpickler):
    """Python's unpickler, except that calls go to MAKERS or nowhere.

    Args:
        file: Where the pickle begins. Afterwards it stands at the end of the pickle.
        file_size: Bytes of the whole file.
        read: Gives the bytes of tensors by their name and number.

    Attributes:
        storages: The bytes that were read, by name.
    """

    def __init__(
        self, file: BinaryIO, file_size: int, read: Callable[[str, int], UntypedStorage]
    ) -> None:
        super().__init__(file, encoding='latin1')
        # A file reserves memory for as many bytes as an instruction asks for.
        self._file_read = lambda size: file.read(min(size, file_size))
        self._read = read
        self.storages: dict[str, Storage] = {}
        self._may_copy = 10**5 + MAX_COPIED * file_size

    def load(self) -> object:
        """Gives the value of the pickle.

        Raises:
            RefusedError: If the pickle is more than data.
            pickle.UnpicklingError, ValueError, and other errors of damaged pickles.
        """
        content = super().load()
        level = [content]
        for _ in range(MAX_DEPTH):
            parts = {}
            for value in level:
                if isinstance(value, dict):
                    value = [*value.values(), *getattr(value, '__dict__', {}).values()]
                if isinstance(value, (list, tuple)):
                    parts.update((id(part), part) for part in value)
            level = parts.values()
        if level:
            raise RefusedError(f'a value contains itself, or has more than {MAX_DEPTH} levels')
        return content

    def persistent_load(self, pid: tuple) -> Storage:
        """Gives the storage of a tensor; each is read once."""
        _, dtype, key, _, count, *view = pid
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(count, int)
        if not known or view not in ([], [None]):  # views of storages are of torch before 0.4
            raise pickle.UnpicklingError('a tensor without a type, name or size')
        if key not in self.storages:
            self.storages[key] = Storage(dtype, self._read(key, count * dtype.itemsize))
        return self.storages[key]

    def find_class(self, module: str, name: str) -> torch.dtype | Foreign:
        """Gives what a name stands for until it is called."""
        if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module in ('torch', 'torch.storage') and name in STORAGES:
            return STORAGES[name]
        # Names of Python 2 and of NumPy 2.
        full_name = re.sub(r'^__builtin__\.', 'builtins.', f'{module}.{name}')
        full_name = re.sub(r'^numpy\._core\.', 'numpy.core.', full_name)
        if full_name not in MAKERS and not INERT.fullmatch(full_name):
            raise RefusedError(
                f'reading it would run {full_name}; a checkpoint holds tensors and plain values'
            )
        return Foreign(full_name)

    def _reduce(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Foreign) or not isinstance(args, tuple):
            raise pickle.UnpicklingError('a call of something without a name')
        self._count_copied(args)
        self.append(MAKERS[called.name](*args) if called.name in MAKERS else called)

    def _build(self) -> None:
        state = self.stack.pop()
        self._count_copied(state if isinstance(state, tuple) else (state,))
        _fill(self.stack[-1], state)

    def _count_copied(self, values: tuple) -> None:
        """A small file could have a long text copied until the memory is full."""
        self._may_copy -= sum(len(v) for v in values if isinstance(v, SIZED))
        if self._may_copy < 0:
            raise RefusedError('it copies its values too often')

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [(key, value)])

    def _setitems(self) -> None:
        values = self.pop_mark()
        _put(self.stack[-1], zip(values[::2], values[1::2]))

    def _additems(self) -> None:
        values = self.pop_mark()
        set.update(self.stack[-1], map(_key, values))

    def _frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(_key, values)))

    def _unknown(self) -> None:
        raise pickle.UnpicklingError('an instruction that no checkpoint has')

    dispatch = collections.defaultdict(lambda: Unpickler._unknown)
    for _name in SAFE.split():
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _reduce
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = _setitem, _setitems
    dispatch[pickle.ADDITEMS[0]], dispatch[pickle.FROZENSET[0]] = _additems, _frozenset


def _key(value: object) -> object:
    """Gives a value that is safe to hash: Python follows tuples in tuples without a limit."""
    parts = value if isinstance(value, tuple) else (value,)
    if wrong := [type(part).__name__ for part in parts if not isinstance(part, KEYS)]:
        raise RefusedError(f'a {wrong[0]} is a key, or an element of a set')
    return value


def _put(target: dict | Foreign, items: Iterable[tuple]) -> dict:
    for key, value in items:
        if isinstance(target, dict) and not isinstance(value, Foreign):
            target[_key(key)] = value
    return target


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError('a tensor without bytes or size')
    count, data = _product(size), storage.data
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
    _product((offset, *stride))
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if count else 0
    if max(reach, count) * dtype.itemsize > data.nbytes():
        raise RefusedError('a tensor in it is larger than its bytes')
    return torch.empty(0, dtype=dtype, device=data.device).set_(data, offset, size, stride)


def _product(sizes: tuple) -> int:
    if not isinstance(sizes, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise ValueError('a tensor or an array of impossible size')
    return math.prod(sizes)


def _mapping(kind: type[dict]) -> Callable:
    """Gives a function that makes a dict of nothing, of a dict or of pairs."""
    return lambda given=(): _put(kind(), given.items() if isinstance(given, dict) else given)


def _latin1(text: str | bytes, encoding: object = 'latin1') -> bytes:
    """Gives bytes, which are text in the pickles of Python 2."""
    if encoding not in ('latin1', 'latin-1'):
        name = encoding[:40] if isinstance(encoding, str) else type(encoding).__name__
        raise RefusedError(f'reading it would run the codec {name}')
    return text if isinstance(text, bytes) else text.encode('latin1')


def _dtype(name: str, *rest) -> np.dtype:
    if not re.fullmatch(r'b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9]\d{0,3}', name):
        raise ValueError(f'an array of type {name[:40]}')
    return np.dtype(name)


def _scalar(dtype: np.dtype, data: bytes | str) -> np.generic:
    if not isinstance(dtype, np.dtype):
        raise ValueError('a number without a type')
    (value,) = np.frombuffer(_latin1(data), dtype)
    return value


def _fill(target: object, state: object) -> None:
    """Gives an object its state."""
    match target, state:
        case (Foreign(), _) | (np.dtype(), (_, '<' | '|' | '=', *_)):
            pass
        case collections.OrderedDict(), {'_metadata': dict() as metadata}:
            target._metadata = metadata  # of state dicts
        case dict(), _:
            pass
        case np.ndarray(), (_, shape, np.dtype() as dtype, fortran, data):
            data = _latin1(data)
            if _product(shape) * dtype.itemsize != len(data):
                raise ValueError('an array of another size than its bytes')
            target.__setstate__((1, shape, dtype, fortran is True, data))
        case HistoryBuffer(), {
            '_log_history': np.ndarray() as values,
            '_count_history': np.ndarray() as counts,
            'max_length': int() as length,
        }:
            target._log_history, target._count_history = values, counts
            target.max_length = length
        case _:
            raise ValueError(f'a {type(target).__name__} with a state that it cannot have')


MAKERS: dict[str, Callable] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor,
    'torch._utils._rebuild_parameter': lambda data, grad, *_: nn.Parameter(data, grad is True),
    'torch._utils._rebuild_parameter_with_state': lambda d, g, *_: nn.Parameter(d, g is True),
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    '_codecs.encode': _latin1,
    'builtins.bytearray': lambda data=b'', *encoding: bytearray(_latin1(data, *encoding)),
    'builtins.bytes': lambda: b'',  # what is longer goes through the codec
    'builtins.complex': complex,
    'builtins.frozenset': lambda values=(): frozenset(map(_key, values)),
    'builtins.set': lambda values=(): set(map(_key, values)),
    'collections.Counter': _mapping(collections.Counter),
    'collections.OrderedDict': _mapping(collections.OrderedDict),
    'collections.defaultdict': lambda factory=None: {},
    'mmengine.config.config.ConfigDict': _mapping(dict),
    'mmengine.logging.history_buffer.HistoryBuffer': lambda: HistoryBuffer(),
    'numpy.core.multiarray._reconstruct': lambda *_: np.empty(0),
    'numpy.core.multiarray.scalar': _scalar,
    'numpy.dtype': _dtype,
    'pathlib.PosixPath': Path,
    'pathlib._local.PosixPath': Path,
}
