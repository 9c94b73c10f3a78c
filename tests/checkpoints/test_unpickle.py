"""Pickles of strangers: plain values as they were, or one clear error; never run."""

import multiprocessing
import os
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import CheckpointLoader

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.schemes import load_without_code
from mmslak.checkpoints.unpickle import Foreign
from mmslak.errors import CheckpointError
from tests.checkpoints.pickles import TEXT, call, doubled, optimizer, write_zip


def test_another_codec_is_refused(tmp_path):
    data = optimizer(call('_codecs.encode', TEXT, b'X\x08\x00\x00\x00punycode'))
    with pytest.raises(CheckpointError, match='would run the codec punycode'):
        read_checkpoint(write_zip(tmp_path / 'x.pth', data, {}))


OUTSIDE = b']q\x01' + b'(]q\x00h\x00e0h\x00' * 40 + b'0h\x01'  # the outermost list is first


PAIRS = doubled(b')', b'h\x00h\x00\x86', 40)


NUMBERS = b'}(' + b''.join(b'I%d\nN' % n for n in range(2000)) + b'uq\x010'
ENDLESS = {
    'key': b'\x80\x02})' + b'\x85' * 200_000 + b'K\x01s.',
    'key of pairs': b'\x80\x02})' + b'K\x01\x86' * 100_000 + b'K\x01s.',
    'key in the memo': b'\x80\x02})' + b'q\x000(h\x00t' * 100_000 + b'K\x01s.',
    'doubled key': b'\x80\x02}' + PAIRS + b'K\x01s.',
    'doubled key of a literal': b'\x80\x02(' + PAIRS + b'K\x01d.',
    'doubled element': b'\x80\x04\x8f(' + PAIRS + b'\x90.',
    'doubled key of a call': optimizer(
        call('collections.OrderedDict', b'](](' + PAIRS + b'K\x01eae')
    ),
    'deep lists': optimizer(b']' * 100_000 + b'a' * 99_999),
    'deep dicts': optimizer(b'}K\x00' * 100_000 + b'N' + b's' * 100_000),
    'itself': optimizer(b']q\x00h\x00a'),
    'itself in a dict': optimizer(b'}q\x00K\x01h\x00s'),
    'itself in a tuple': optimizer(b']q\x00h\x00\x85a'),
    'itself in a record': optimizer(call('pathlib.PosixPath', b']q\x00h\x00a')),
    'name of bytes': optimizer(
        b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\n' + OUTSIDE + TEXT + b'K\x01tQ'
    ),
    'name of a codec': optimizer(call('_codecs.encode', TEXT, OUTSIDE)),
    'name of a type': optimizer(call('numpy.dtype', OUTSIDE)),
    'copied bytes': optimizer(
        b'](' + call('builtins.bytearray', b'h\x01') * 5000 + b'e',
        before=b'B' + (100_000).to_bytes(4, 'little') + bytes(100_000) + b'q\x010',
    ),
    'copied text': optimizer(
        b'](' + call('_codecs.encode', b'h\x01', b'X\x06\x00\x00\x00latin1') * 5000 + b'e',
        before=b'X' + (100_000).to_bytes(4, 'little') + b'x' * 100_000 + b'q\x010',
    ),
    'copied dict': optimizer(
        b'](' + call('collections.OrderedDict', b'h\x01') * 2000 + b'e', before=NUMBERS
    ),
    'copied attributes': optimizer(
        b'](' + (call('collections.OrderedDict') + b'h\x01b') * 2000 + b'e', before=NUMBERS
    ),
}


def read_by_force(path: Path, results) -> None:
    try:
        load_without_code()
        CheckpointLoader.load_checkpoint(str(path))
        results.put('read')
    except CheckpointError as error:
        results.put(str(error))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize('kind', ENDLESS)
def test_values_that_never_end_get_one_clear_error(tmp_path, kind):
    """In a process of its own: they would end it, or keep it for ever."""
    path = write_zip(tmp_path / 'x.pth', ENDLESS[kind], {})
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    process = context.Process(target=read_by_force, args=(path, results))
    process.start()
    try:
        process.join(60)
        assert process.exitcode == 0
        said = results.get(timeout=5)
    finally:
        process.kill()
    assert f'{path}: refused, because ' in said or f'{path}: truncated, damaged' in said
    assert '\n' not in said
    assert len(said) < 500


def test_shared_values_are_read_once(tmp_path):
    betas, names = (0.9, 0.99), ['a', 'b']
    groups = [dict(lr=0.1, betas=betas, names=names) for _ in range(3000)]
    content = dict(param_groups=groups, classes=tuple(map(str, range(5000))), again=groups)
    torch.save(dict(optimizer=content), tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')['optimizer']
    assert read == content
    assert read['again'] is read['param_groups']
    assert read['again'][0]['names'] is read['again'][-1]['names']


def test_an_ordered_dict_of_python_2_is_read(tmp_path):
    items = b'](](' + TEXT + b'K\x01e](X\x01\x00\x00\x00bK\x02ee'
    attributes = b'}X\x09\x00\x00\x00_metadata}K\x01K\x02ss'
    data = optimizer(call('collections.OrderedDict', items) + attributes + b'b')
    (read,) = read_checkpoint(write_zip(tmp_path / 'x.pth', data, {})).values()
    assert read == OrderedDict(a=1, b=2)
    assert read._metadata == {1: 2}


PLAIN = [
    *(np.array([]), np.zeros((0, 3), np.int64), b'', b'a', frozenset(), frozenset({(1, 2, 'a')})),
    *({1, 2}, bytearray(), bytearray(b'\xff'), 1j, Path('a/b'), np.float32(1.5), np.array(['é'])),
    *(torch.Size([2, 3]), torch.device('cuda', 1), np.ones((2, 3), order='F')),
]


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('value', PLAIN, ids=repr)
def test_plain_values_are_read_as_they_were(tmp_path, value, protocol):
    torch.save({'a': [value]}, tmp_path / 'x.pth', pickle_protocol=protocol)
    (read,) = read_checkpoint(tmp_path / 'x.pth')['a']
    assert type(read) is type(value)
    if isinstance(value, np.ndarray):
        assert (read.shape, read.dtype, read.tolist()) == (
            value.shape,
            value.dtype,
            value.tolist(),
        )
    else:
        assert read == value


@pytest.mark.parametrize('name', ['bytes', 'bytearray', 'frozenset', 'set'])
def test_plain_values_are_not_made_of_sizes_or_codecs(tmp_path, name):
    for arguments in (b'J\xff\xff\xff\x7f', TEXT + b'X\x08\x00\x00\x00punycode'):
        path = write_zip(tmp_path / 'x.pth', optimizer(call(f'__builtin__.{name}', arguments)), {})
        with pytest.raises(CheckpointError, match=r'x\.pth'):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ('value', 'plain'),
    [
        (ConfigDict(a=ConfigDict(b=[1])), dict(a=dict(b=[1]))),
        (defaultdict(list, a=[1]), dict(a=[1])),
        (OrderedDict(a=1), OrderedDict(a=1)),
        (Counter([3, 3, 5]), Counter([3, 3, 5])),
    ],
)
def test_dicts_of_all_kinds(tmp_path, value, plain):
    torch.save({'a': value}, tmp_path / 'x.pth')
    (read,) = read_checkpoint(tmp_path / 'x.pth').values()
    assert read == plain
    assert type(read) is type(plain)


SHARED = {
    'lists': (doubled(b']', b'](h\x00h\x00e', 40), list),
    'dicts': (doubled(b'}', b'}(K\x00h\x00K\x01h\x00u', 40), dict),
    'tuples': (PAIRS, tuple),
}


@pytest.mark.parametrize('kind', SHARED)
def test_values_that_are_shared_again_and_again_take_no_time(tmp_path, kind):
    data, expected = SHARED[kind]
    (value,) = read_checkpoint(write_zip(tmp_path / 'x.pth', optimizer(data), {})).values()
    for _ in range(40):
        assert type(value) is expected
        first, second = value.values() if expected is dict else value
        assert first is second
        value = first
    assert len(value) == 0


def test_dicts_leave_out_what_is_not_rebuilt(tmp_path):
    """Such as the function of a scheduler, whose successor has its own."""
    state = dict(anneal=np.mean, last_step=3, functions=[np.mean])
    torch.save(dict(param_schedulers=[state]), tmp_path / 'x.pth')
    (read,) = read_checkpoint(tmp_path / 'x.pth')['param_schedulers']
    assert read == dict(last_step=3, functions=[Foreign('numpy.mean')])
