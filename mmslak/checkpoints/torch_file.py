"""Files of torch.save: a pickle and the bytes of its tensors, in a zip file or one after the other.

Checksums of zip files are verified. The legacy format has none.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from mmslak.checkpoints.unpickle import RefusedError, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format, before torch 1.6


def load(path: str | Path, tensors: bool = True) -> object:
    """Reads a file that torch.save wrote, in either of its formats, to the CPU.

    Args:
        path: The file.
        tensors: Whether to read the bytes of tensors, which are on the meta device otherwise.

    Raises:
        RefusedError: If the file is more than data.
        pickle.UnpicklingError, zipfile.BadZipFile, ValueError, OSError, and what else damaged
            pickles raise: If the file is damaged.
    """
    path = Path(path)
    with path.open('rb') as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return _load_zip(archive, path.stat().st_size, tensors)
        file.seek(0)
        return _load_legacy(file, path.stat().st_size, tensors)


def check(content: object) -> None:
    """Raises what `load` would raise after torch.save, or what pickle raises at an object."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=torch.serialization.DEFAULT_PROTOCOL)
    no_bytes = ('storage', torch.uint8, '', 'cpu', 0)
    pickler.persistent_id = lambda value: no_bytes if isinstance(value, Tensor) else None
    pickler.dump(content)
    Unpickler(io.BytesIO(buffer.getvalue()), buffer.tell(), _unread).load()


def _load_zip(archive: zipfile.ZipFile, file_size: int, tensors: bool) -> object:
    records = {info.filename: info for info in archive.infolist()}
    roots = [n.removesuffix('data.pkl') for n in records if n.endswith('/data.pkl')]
    if len(roots) != 1:
        raise ValueError('no data.pkl in it')
    root, order = roots[0], f'{roots[0]}byteorder'
    if f'{root}constants.pkl' in records:
        raise RefusedError('it is a TorchScript program')
    if len(records) != len(archive.infolist()):
        raise RefusedError('two of its records have one name')
    # torch never compresses, so that no record is larger than the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise RefusedError('its records are compressed')
    if sum(info.file_size for info in records.values()) > file_size:
        raise RefusedError('its records are larger than the file')
    if order in records and archive.read(order) != b'little':
        raise ValueError('written on a machine of another byte order')

    def read(key: str, size: int) -> UntypedStorage:
        return _storage(archive.read(f'{root}data/{key}'), size)

    data = io.BytesIO(archive.read(f'{root}data.pkl'))
    return Unpickler(data, file_size, read if tensors else _unread).load()


def _load_legacy(file: BinaryIO, file_size: int, tensors: bool) -> object:
    magic, protocol, system = (Unpickler(file, file_size, _unread).load() for _ in range(3))
    if magic != MAGIC or protocol != PROTOCOL or system.get('little_endian') is not True:
        raise ValueError('not a file of torch.save, or one of another byte order')
    # Bytes come last. The first reading tells how many; a second one uses them.
    start, first = file.tell(), Unpickler(file, file_size, _unread)
    content = first.load()
    if not tensors:
        return content
    loaded = {}
    for key in Unpickler(file, file_size, _unread).load():
        storage = first.storages.get(key) if isinstance(key, str) else None
        size = storage.data.nbytes() if storage else 0
        if not storage or int.from_bytes(file.read(8), 'little') * storage.dtype.itemsize != size:
            raise ValueError('a tensor has another size than it says')
        loaded[key] = _storage(file.read(min(size, file_size)), size)
    file.seek(start)
    return Unpickler(file, file_size, lambda key, size: loaded[key]).load()


def _unread(key: str, size: int) -> UntypedStorage:
    return UntypedStorage(size, device='meta')


def _storage(data: bytes, size: int) -> UntypedStorage:
    if len(data) != size:
        raise ValueError(f'a tensor has {len(data)} bytes, {size} expected')
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    return flat.untyped_storage()
