"""Files and pickles that no torch.save writes."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch

HARM = 'harm_done'


class Harm:
    """Would make a folder when it is read as a program."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __reduce__(self) -> tuple:
        return [
            (os.mkdir, (HARM,)),
            (os.system, (f'mkdir {HARM}',)),
            (eval, (f'__import__("os").mkdir("{HARM}")',)),
            (exec, (f'import os; os.mkdir("{HARM}")',)),
            (getattr, (Path('a'), 'mkdir')),
            # A module that is known, a function of it that is not to be called.
            (__import__('mmengine').mkdir_or_exist, (HARM,)),
            (torch.load, (HARM,)),
        ][self.how]


def write_zip(path: Path, data: bytes, records: dict[str, bytes], compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, 'w', kind) as archive:
        archive.writestr('x/data.pkl', data)
        for name, content in records.items():
            archive.writestr(f'x/{name}', content)
    return path


class Pickler(pickle.Pickler):
    """Writes (storage type, key, count) as torch writes storages."""

    def persistent_id(self, value: object) -> tuple | None:
        return ('storage', *value[1:3], 'cpu', value[3]) if is_storage(value) else None


def is_storage(value: object) -> bool:
    return isinstance(value, tuple) and value[:1] == ('STORAGE',)


class Rebuilt:
    def __init__(self, *args) -> None:
        self.args = args

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.args


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def tensor(count: int, size: tuple, stride: tuple, offset: int = 0) -> bytes:
    storage = ('STORAGE', torch.FloatStorage, '0', count)
    return pickled({'w': Rebuilt(storage, offset, size, stride, False, {})})


def call(name: str, *args: bytes) -> bytes:
    """Instructions that call a function."""
    module, _, name = name.rpartition('.')
    return f'c{module}\n{name}\n('.encode() + b''.join(args) + b'tR'


def optimizer(value: bytes, before: bytes = b'') -> bytes:
    """A checkpoint with this optimizer."""
    return b'\x80\x03' + before + b'}X\x09\x00\x00\x00optimizer' + value + b's.'


def doubled(first: bytes, twice: bytes, times: int) -> bytes:
    """Instructions that put a value into another one twice, and so on; it is number 0 of the memo.

    In a few bytes there are 2^times values.
    """
    return first + b'q\x000' + (twice + b'q\x000') * times + b'h\x00'


TEXT = b'X\x01\x00\x00\x00a'
