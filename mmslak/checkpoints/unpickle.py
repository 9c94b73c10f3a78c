"""Files of torch.save read as data: nothing is run, nothing larger than the file is allocated.

A checkpoint is a pickle, and a pickle is a program: it names functions and has them called. Here
every name stands for an inert record of how it was called. Of those, tensors, arrays and a few
plain containers are then rebuilt, and only these; names of other packages are refused. Bytes are
verified by the archive's checksums, and sizes that the file declares are held against the bytes
that it has. So is the work that its values make, which refer to each other.
"""

import argparse
import collections
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MAX_DEPTH = 200  # of values in values; what uses them later recurses, too
# Values that are met again, and bytes that are copied: so many, and some for each byte of a pickle.
MAX_REPEATED = 10**6, 10
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files older than torch 1.6
# Plain data of checkpoints may be wrapped in objects of these packages: log buffers, scalars,
# settings. What is not rebuilt below stays an inert record.
INERT_PACKAGES = (
    'collections',
    'mmengine',
    'mmcv',
    'mmdet',
    'mmseg',
    'mmpretrain',
    'mmcls',
    'numpy',
    'pathlib',
)
# MMEngine's log buffers refer to their methods by getattr, default dicts to a type.
INERT_NAMES = {
    f'{module}.{name}'
    for module in ('builtins', '__builtin__')
    for name in ('getattr', 'list', 'dict', 'int', 'float', 'str', 'tuple', 'object')
}
STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexDoubleStorage': torch.complex128,
    'ComplexFloatStorage': torch.complex64,
    'UntypedStorage': torch.uint8,
}


class RefusedError(ValueError):
    """A file that asks for code to be run, or for more memory than it has bytes."""


def load(path: str | Path, tensors: bool = True) -> object:
    """The content of a file that torch.save wrote, on the CPU.

    Args:
        path: A file of either of torch's formats.
        tensors: Read their bytes; else they are on torch's meta device, and not verified.

    Returns:
        Containers, plain values, tensors, arrays; `Foreign` records of what is none of these.

    Raises:
        RefusedError: If the file is more than data.
        pickle.UnpicklingError, zipfile.BadZipFile, ValueError, OSError, and what else damaged
            pickles raise: If it is damaged.
    """
    with Path(path).open('rb') as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return _load_zip(archive, Path(path).stat().st_size, tensors)
        file.seek(0)
        return _load_legacy(file, tensors)


def check(content: object) -> None:
    """Reads back what torch.save would write of a content, but for the bytes of tensors.

    Raises:
        As `load`; and what pickle raises of what it cannot write.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=torch.serialization.DEFAULT_PROTOCOL).dump(content)
    size = buffer.tell()
    buffer.seek(0)
    _Rebuild(True, size)(_unpickle(buffer, lambda pid: None))


class _Pickler(pickle.Pickler):
    """Writes the name of a storage in the place of a tensor."""

    def persistent_id(self, value: object) -> tuple | None:
        return ('storage', torch.uint8, '', 'cpu', 0) if isinstance(value, Tensor) else None


class Foreign:
    """Stands for an object of a class of the file: what it was called with, and nothing done.

    Attributes:
        full_name: Module and name in the file.
        args: Positional arguments.
        state: What would have been its state.
        items: Elements that were to be put in it, as (key, value) or values.
    """

    full_name = ''

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        self.items.append(value)

    def extend(self, values: list) -> None:
        self.items.extend(values)


def drop_records(value: object) -> None:
    """Takes entries that are `Foreign` out of dicts, in place, through dicts and lists.

    State dicts of schedulers hold functions that the new scheduler has already; in place of them, a
    record could only do harm.
    """
    found, seen = [value], set()
    while found:
        value = found.pop()
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            for key in [key for key, entry in value.items() if isinstance(entry, Foreign)]:
                del value[key]
            value = value.values()
        found += value


class _Storage:
    """Bytes of tensors, read when a tensor needs them."""

    def __init__(self, dtype: torch.dtype, size: int, read: Callable[[], bytearray]) -> None:
        self.dtype, self.size, self._read = dtype, size, read
        self._storage: torch.UntypedStorage | None = None

    def get(self) -> torch.UntypedStorage:
        if self._storage is None:
            data = self._read()
            if len(data) != self.size:
                raise ValueError(f'a tensor has {len(data)} bytes, {self.size} expected')
            flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
            self._storage = flat.untyped_storage()
        return self._storage


class _Unpickler(pickle.Unpickler):
    """Makes records of everything that has a name."""

    def __init__(self, data: bytes, storage_of: Callable[[tuple], _Storage]) -> None:
        super().__init__(io.BytesIO(data), encoding='utf-8')
        self._storage_of = storage_of
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> object:
        full_name = f'{module}.{name}'
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ('torch', 'torch.storage') and name in STORAGES:
            return STORAGES[name]
        if full_name == 'collections.OrderedDict':
            return self._ordered_dict
        known = full_name in REBUILT or full_name in INERT_NAMES
        if not known and module.partition('.')[0] not in INERT_PACKAGES:
            raise RefusedError(
                f'reading it would run {full_name}; a checkpoint holds tensors and plain values'
            )
        return self._class(full_name)

    def _class(self, full_name: str) -> type:
        if full_name not in self._classes:
            name = full_name.rpartition('.')[2]
            self._classes[full_name] = type(name, (Foreign,), dict(full_name=full_name))
        return self._classes[full_name]

    def _ordered_dict(self, *args) -> OrderedDict | Foreign:
        """Python 2 gives the items to the call; these may be many calls with the same ones."""
        return self._class('collections.OrderedDict')(*args) if args else OrderedDict()

    def persistent_load(self, pid: tuple) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
            raise pickle.UnpicklingError('unknown persistent id')
        if not isinstance(pid[1], torch.dtype) or not _is_count(pid[4]):
            raise pickle.UnpicklingError('a storage without a type or size')
        if not isinstance(pid[2], (str, int)):
            raise pickle.UnpicklingError('a storage without a name')
        return self._storage_of(pid)


def _load_zip(archive: zipfile.ZipFile, file_size: int, tensors: bool) -> object:
    records = {info.filename: info for info in archive.infolist()}
    roots = [n.removesuffix('data.pkl') for n in records if n.endswith('/data.pkl')]
    if len(roots) != 1:
        raise ValueError('no data.pkl in it')
    root = roots[0]
    if f'{root}constants.pkl' in records:
        raise RefusedError('it is a TorchScript program')
    if len(records) != len(archive.infolist()):
        raise RefusedError('two of its records have one name')
    # torch never compresses, so that what is unpacked is no larger than the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise RefusedError('its records are compressed')
    if sum(info.file_size for info in records.values()) > file_size:
        raise RefusedError('its records are larger than the file')
    order = f'{root}byteorder'
    if order in records and archive.read(order) != b'little':
        raise ValueError('written on a machine of another byte order')

    storages: dict[str, _Storage] = {}

    def storage_of(pid: tuple) -> _Storage:
        key = str(pid[2])
        if key not in storages:
            info = records.get(f'{root}data/{key}')
            if info is None:
                raise ValueError(f'no bytes of tensor {key} in it')
            storages[key] = _Storage(
                pid[1], pid[4] * pid[1].itemsize, lambda: bytearray(archive.read(info))
            )
        return storages[key]

    data = archive.read(f'{root}data.pkl')
    return _Rebuild(tensors, len(data))(_unpickle(io.BytesIO(data), storage_of))


def _load_legacy(file: io.BufferedReader, tensors: bool) -> object:
    def no_storage(pid: tuple) -> _Storage:
        raise ValueError('tensors before the tensors')

    if _unpickle(file, no_storage) != MAGIC or _unpickle(file, no_storage) != PROTOCOL:
        raise ValueError('not a file of torch.save')
    system = _unpickle(file, no_storage)
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise ValueError('written on a machine of another byte order')
    storages: dict[str, _Storage] = {}
    places: dict[str, int] = {}

    def storage_of(pid: tuple) -> _Storage:
        dtype, key, size = pid[1], str(pid[2]), pid[4] * pid[1].itemsize
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError('a view of a storage, as torch before 0.4 wrote')

        def read() -> bytearray:
            file.seek(places[key])
            return bytearray(file.read(size))

        if key not in storages:
            storages[key] = _Storage(dtype, size, read)
        return storages[key]

    content = _unpickle(file, storage_of)
    position, size = 0, file.tell()
    for key in _unpickle(file, no_storage):
        position = position or file.tell()
        file.seek(position)
        count = int.from_bytes(file.read(8), 'little')
        places[key] = position + 8
        if key not in storages or count * storages[key].dtype.itemsize != storages[key].size:
            raise ValueError(f'tensor {key} has another size than it says')
        position += 8 + storages[key].size
    if position > file.seek(0, io.SEEK_END):
        raise ValueError('tensors are cut off')
    return _Rebuild(tensors, size)(content)


def _unpickle(file: io.BufferedIOBase, storage_of: Callable[[tuple], _Storage]) -> object:
    """The next pickle of a file, after a look at its instructions.

    The interpreter reserves room for a memo of any number that an instruction names.
    """
    start, memo, sizes = file.tell(), 0, _Sizes()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo = max(memo, argument)
            if memo > count:
                raise RefusedError('its pickle has a memo without end')
        sizes.step(opcode.name, argument, count)
    end = file.tell()
    file.seek(start)
    return _Unpickler(file.read(end - start), storage_of).load()


def _check_repeated(count: int, size: int) -> None:
    if count > MAX_REPEATED[0] + MAX_REPEATED[1] * size:
        raise RefusedError('its values refer to each other too often')


class _Sizes:
    """Follows a pickle with the (size, depth) of values in place of the values.

    Keys are hashed while a pickle is read, and attributes copied: a tuple in a tuple in a tuple
    would overflow the interpreter's stack, and one that has another twice, and so on, take for
    ever. Tuples have what they ever will when they are made; what is put into lists and dicts of
    others later is counted by _Rebuild.
    """

    EFFECTS = {
        opcode.name: (
            pickletools.markobject in opcode.stack_before,
            (*opcode.stack_before, pickletools.markobject).index(pickletools.markobject),
            len(opcode.stack_after),
        )
        for opcode in pickletools.opcodes
    }
    PUTS = {'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'}
    GETS = {'GET', 'BINGET', 'LONG_BINGET'}
    FILL = {'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD'}
    MARK: list[int] = []

    def __init__(self) -> None:
        self._repeated = 0  # sum of the sizes of values that were met again
        self._stack: list[list[int]] = []
        self._memo: dict[int, list[int]] = {}

    def step(self, name: str, argument: object, count: int) -> None:
        """Does what the instruction of this number does; damaged pickles end in a LookupError."""
        stack = self._stack
        if name in self.PUTS:
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in self.GETS or name == 'DUP':
            stack.append(stack[-1] if name == 'DUP' else self._memo[argument])
            self._repeated += stack[-1][0]
            _check_repeated(self._repeated, count)
        elif name == 'MARK':
            stack.append(self.MARK)
        elif name == 'POP':
            stack.pop()
        else:
            to_mark, below, pushed = self.EFFECTS[name]
            taken = []
            while to_mark and (top := stack.pop()) is not self.MARK:
                taken.append(top)
            for _ in range(below):
                taken.append(stack.pop())
            value = taken.pop() if name in self.FILL else [1, 0]
            for size, depth in taken:
                value[0] += size
                value[1] = max(value[1], depth + 1)
            if value[1] > MAX_DEPTH:
                raise RefusedError(f'its values are nested deeper than {MAX_DEPTH}')
            stack += [value] * pushed


class _Rebuild:
    """Puts values in the place of records, through containers; each object once.

    Refused are values that contain themselves, that are nested too deep, and those that a walk
    which does not know what it has seen would not come to an end with.

    Args:
        tensors: Read the bytes of tensors.
        size: Bytes of the pickle.
    """

    def __init__(self, tensors: bool, size: int) -> None:
        self.tensors = tensors
        self._size, self._repeated = size, 0
        self._seen = 0
        self._done: dict[int, tuple[object, object, int]] = {}
        self._open: set[int] = set()

    def repeat(self, count: int) -> None:
        """Counts values or bytes that are copied or met again."""
        self._repeated += count
        _check_repeated(self._repeated, self._size)

    def __call__(self, value: object) -> object:
        self._seen += 1
        if not isinstance(value, (dict, list, tuple, Foreign, _Storage)):
            return value
        key = id(value)
        if key in self._done:
            _, new, size = self._done[key]
            self._seen += size
            self.repeat(size)
            return new
        if key in self._open:
            raise RefusedError('a value in it contains itself')
        if len(self._open) == MAX_DEPTH:
            raise RefusedError(f'its values are nested deeper than {MAX_DEPTH}')
        before, new = self._seen, value
        self._open.add(key)
        if isinstance(value, dict):
            self._fill_dict(value)
        elif isinstance(value, list):
            value[:] = [self(element) for element in value]
        elif isinstance(value, tuple):
            new = tuple(self(element) for element in value)
        elif isinstance(value, _Storage):
            raise ValueError('bytes that belong to no tensor')
        elif value.full_name in REBUILT:
            new = REBUILT[value.full_name](self, value)
        self._open.remove(key)
        # The old one is kept, so that its id is not given to another.
        self._done[key] = value, new, self._seen - before
        return new

    def _fill_dict(self, value: dict) -> None:
        metadata = vars(value).get('_metadata') if isinstance(value, OrderedDict) else None
        for key in list(value):
            new_key = self(key)
            if isinstance(key, Foreign):
                value[new_key] = value.pop(key)
                key = new_key
            value[key] = self(value[key])
        if isinstance(value, OrderedDict):
            vars(value).clear()
            if isinstance(metadata, dict):
                value._metadata = self(metadata)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _tensor(rebuild: _Rebuild, record: Foreign) -> Tensor:
    storage, offset, size, stride, *rest = record.args
    if isinstance(size, Foreign):
        size = rebuild(size)
    if not isinstance(storage, _Storage) or not isinstance(size, tuple):
        raise ValueError('a tensor without bytes or size')
    dtype = storage.dtype
    if record.full_name.endswith('_v3'):
        dtype = rest[2]
        if not isinstance(dtype, torch.dtype):
            raise ValueError('a tensor without a type')
    if len(size) != len(stride) or not all(map(_is_count, (offset, *size, *stride))):
        raise ValueError('a tensor of impossible size')
    count = math.prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if count else 0
    if max(reach, count) * dtype.itemsize > storage.size:
        raise RefusedError('a tensor in it is larger than its bytes')
    if not rebuild.tensors:
        return torch.empty(size, dtype=dtype, device='meta')
    return torch.empty(0, dtype=dtype).set_(storage.get(), offset, size, tuple(stride))


def _parameter(rebuild: _Rebuild, record: Foreign) -> nn.Parameter:
    data = rebuild(record.args[0])
    if not isinstance(data, Tensor):
        raise ValueError('a parameter without a tensor')
    return nn.Parameter(data, requires_grad=record.args[1] is True)


def _latin1(rebuild: _Rebuild, record: Foreign) -> bytes:
    text, encoding = record.args
    if encoding not in ('latin1', 'latin-1'):
        name = encoding[:40] if isinstance(encoding, str) else 'that it has no name for'
        raise RefusedError(f'reading it would run the codec {name}')
    rebuild.repeat(len(text))
    return text.encode('latin1')


def _plain(kind: type, element: type) -> Callable[[_Rebuild, Foreign], object]:
    """Rebuilds a builtin from an iterable that the file has; never from a size."""

    def rebuild_plain(rebuild: _Rebuild, record: Foreign) -> object:
        values = [rebuild(value) for value in record.args]
        if any(not isinstance(value, element) for value in values):
            raise ValueError(f'a {kind.__name__} of something else')
        rebuild.repeat(sum(len(value) for value in values if not isinstance(value, (int, float))))
        return kind(*values)

    return rebuild_plain


def _bytearray(rebuild: _Rebuild, record: Foreign) -> bytearray:
    """One of bytes; or of text, as Python 2 wrote it."""
    data = (
        _latin1(rebuild, record) if len(record.args) == 2 else b''.join(map(rebuild, record.args))
    )
    rebuild.repeat(len(data))
    return bytearray(data)


def _dtype(rebuild: _Rebuild, record: Foreign) -> np.dtype:
    name = record.args[0]
    if not isinstance(name, str):
        raise ValueError('an array of a type without a name')
    if not re.fullmatch(r'[<>=|]?(b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,4})', name):
        raise ValueError(f'an array of type {name[:40]}')
    order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else '='
    dtype = np.dtype(name)
    return dtype.newbyteorder(order) if order in ('<', '>') else dtype


def _array(rebuild: _Rebuild, record: Foreign) -> np.ndarray:
    _, shape, dtype, fortran, data = record.state
    dtype, data = rebuild(dtype), rebuild(data)
    if isinstance(data, str):
        data = data.encode('latin1')
    if not isinstance(dtype, np.dtype) or not all(map(_is_count, shape)):
        raise ValueError('an array without type or shape')
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError('an array of another size than its bytes')
    rebuild.repeat(len(data))
    return np.frombuffer(data, dtype).reshape(shape, order='F' if fortran else 'C').copy()


def _scalar(rebuild: _Rebuild, record: Foreign) -> np.generic:
    dtype, data = (rebuild(value) for value in record.args)
    if isinstance(data, str):
        data = data.encode('latin1')
    if not isinstance(dtype, np.dtype) or dtype.itemsize != len(data):
        raise ValueError('a number of another size than its bytes')
    rebuild.repeat(len(data))
    return np.frombuffer(data, dtype)[0]


def _history(rebuild: _Rebuild, record: Foreign) -> object:
    from mmengine.logging import HistoryBuffer

    state = rebuild(record.state)
    values, counts = state['_log_history'], state['_count_history']
    length = state['max_length']
    if not _is_count(length) or not all(isinstance(a, np.ndarray) for a in (values, counts)):
        raise ValueError('a log buffer of something else')
    buffer = HistoryBuffer([], [], length)
    buffer._log_history, buffer._count_history = values, counts
    return buffer


def _namespace(rebuild: _Rebuild, record: Foreign) -> argparse.Namespace:
    return argparse.Namespace(**(rebuild(record.state) or {}))


def _mapping(rebuild: _Rebuild, record: Foreign) -> dict:
    (given,) = record.args or ({},)
    given = rebuild(given)
    rebuild.repeat(len(given))
    return {**(given if isinstance(given, dict) else {}), **rebuild(dict(record.items))}


def _ordered_dict(rebuild: _Rebuild, record: Foreign) -> OrderedDict:
    """One of Python 2, which has its items in the call."""
    items = rebuild(record.args[0])
    rebuild.repeat(len(items))
    value = OrderedDict(items)
    if isinstance(record.state, dict) and isinstance(record.state.get('_metadata'), dict):
        value._metadata = rebuild(record.state['_metadata'])
    return value


REBUILT: dict[str, Callable[[_Rebuild, Foreign], object]] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch.Size': _plain(torch.Size, tuple),
    'torch.device': _plain(torch.device, (str, int)),
    '_codecs.encode': _latin1,
    'argparse.Namespace': _namespace,
    'collections.Counter': lambda rebuild, record: collections.Counter(_mapping(rebuild, record)),
    'collections.OrderedDict': _ordered_dict,
    'collections.defaultdict': _mapping,
    'mmengine.config.config.ConfigDict': _mapping,
    'mmengine.logging.history_buffer.HistoryBuffer': _history,
    'pathlib.PosixPath': _plain(Path, str),
    'pathlib._local.PosixPath': _plain(Path, str),
}
for _module in ('builtins', '__builtin__'):
    REBUILT[f'{_module}.set'] = _plain(set, (list, tuple))
    REBUILT[f'{_module}.frozenset'] = _plain(frozenset, (list, tuple))
    REBUILT[f'{_module}.bytes'] = _plain(bytes, bytes)  # the empty one; others are encoded
    REBUILT[f'{_module}.bytearray'] = _bytearray
    REBUILT[f'{_module}.complex'] = _plain(complex, (int, float))
for _module in ('numpy.core', 'numpy._core'):
    REBUILT[f'{_module}.multiarray._reconstruct'] = _array
    REBUILT[f'{_module}.multiarray.scalar'] = _scalar
REBUILT['numpy.dtype'] = _dtype
