"""Checkpoints of strangers: read as data, refused, or one clear error; never run."""

import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import CheckpointLoader

from mmslak.apis.model import check_fit
from mmslak.checkpoints.files import read_checkpoint, read_state_dict
from mmslak.checkpoints.runs import newest_intact
from mmslak.checkpoints.schemes import load_without_code
from mmslak.checkpoints.torch_file import load
from mmslak.checkpoints.unpickle import Foreign
from mmslak.errors import CheckpointError, UserError
from tests.file_server import running
from tests.toy import assert_same, build_runner, records

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


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a run: weights, averages, optimizer, masks, log buffers, random states."""
    folder = tmp_path_factory.mktemp('run')
    build_runner(
        folder,
        dict(update_interval=1),
        iters=3,
        ema=True,
        hooks=[dict(type='mmslak.ExactResumeHook')],
    ).train()
    return folder / 'iter_3.pth'


def reference(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def test_a_run_is_read_as_torch_reads_it(checkpoint):
    ours, theirs = read_checkpoint(checkpoint), reference(checkpoint)
    assert ours.keys() == theirs.keys()
    for key in set(ours) - {'message_hub'}:
        assert_same(ours[key], theirs[key], key)
    for name, buffer in theirs['message_hub']['log_scalars'].items():
        mine = ours['message_hub']['log_scalars'][name]
        assert type(mine) is type(buffer)
        assert [a.tolist() for a in mine.data] == [a.tolist() for a in buffer.data]
    assert ours['message_hub']['runtime_info'] == theirs['message_hub']['runtime_info']


def test_structure_alone_costs_no_memory(checkpoint):
    content = load(checkpoint, tensors=False)
    tensors = list(content['state_dict'].values())
    assert all(tensor.is_meta for tensor in tensors)
    assert [t.shape for t in tensors] == [
        t.shape for t in reference(checkpoint)['state_dict'].values()
    ]


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('how', range(7))
def test_programs_are_refused_or_inert(tmp_path, monkeypatch, how, zipped):
    monkeypatch.chdir(tmp_path)
    content = {'state_dict': {'a': torch.ones(1)}, 'meta': Harm(how)}
    torch.save(content, 'evil.pth', _use_new_zipfile_serialization=zipped)
    try:
        read_checkpoint('evil.pth')
    except CheckpointError as error:
        assert 'evil.pth: refused, because reading it would run' in str(error)  # noqa: PT017
    assert os.listdir() == ['evil.pth']


def test_a_one_cycle_run_resumes(tmp_path):
    """Its function is a name in the file; the one of the scheduler that was built stays."""
    load_without_code()

    def run(**options) -> tuple[dict, dict]:
        runner = build_runner(
            tmp_path,
            save_every=4,
            hooks=[dict(type='mmslak.ExactResumeHook')],
            param_scheduler=[
                dict(type='OneCycleLR', eta_max=0.2, total_steps=8, by_epoch=False),
                dict(type='ConstantMomentum', factor=0.5, begin=2, end=6, by_epoch=False),
            ],
            **options,
        )
        runner.train()
        return records(runner)[-1], runner.optim_wrapper.get_lr()

    whole = run()
    resumed = run(resume=True, load_from=str(tmp_path / 'iter_4.pth'))
    assert_same(resumed, whole)


# ---------------------------------------------------------------- weights by address


def download(rank: int, folder: Path, url: str, results) -> None:
    """What a process of a machine of its own gets, of two."""
    os.environ.update(LOCAL_RANK='0')
    torch.hub.set_dir(folder / f'machine{rank}')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    load_without_code()
    try:
        results.put((rank, list(CheckpointLoader.load_checkpoint(url))))
    except CheckpointError as error:
        results.put((rank, str(error)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize('name', ['x.pth', 'missing.pth'])
def test_every_machine_downloads_and_fails_with_the_others(tmp_path, name):
    torch.save({'w': torch.ones(1)}, tmp_path / 'x.pth')
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    with running() as server:
        server.files['/x.pth'] = (tmp_path / 'x.pth').read_bytes()
        arguments = tmp_path, server.url(name), results
        processes = [context.Process(target=download, args=(r, *arguments)) for r in range(2)]
        try:
            for process in processes:
                process.start()
            found = dict(results.get(timeout=100) for _ in processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if name == 'x.pth':
        assert found == {0: ['w'], 1: ['w']}
        assert (tmp_path / 'machine1/checkpoints/x.pth').is_file()
    else:
        assert all('missing.pth: 404' in said for said in found.values())


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


@pytest.mark.parametrize(
    ('data', 'compress', 'message'),
    [
        (tensor(10**12, (10**12,), (1,)), False, 'bytes, 4000000000000 expected'),
        (tensor(4, (10**9,), (0,)), False, 'larger than its bytes'),
        (tensor(4, (2, 2), (10**6, 1)), False, 'larger than its bytes'),
        (tensor(4, (4,), (1,), offset=1), False, 'larger than its bytes'),
        (tensor(4, (-1,), (1,)), False, 'impossible size'),
        (tensor(4, (4,), (1,)), True, 'compressed'),
        (b'\x80\x02Nr\xff\xff\xff\x7f.', False, 'holds a NoneType'),
        (pickled({'n': bytearray}), False, None),
    ],
    ids=['count', 'expanded', 'stride', 'offset', 'negative', 'bomb', 'memo', 'class'],
)
def test_sizes_are_bounded_by_the_file(tmp_path, data, compress, message):
    path = write_zip(tmp_path / 'x.pth', data, {'data/0': bytes(16)}, compress)
    if message is None:
        read_checkpoint(path)
        return
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_whole_tensor_of_such_a_file_is_read(tmp_path):
    path = write_zip(tmp_path / 'x.pth', tensor(4, (2, 2), (1, 2)), {'data/0': bytes(16)})
    assert read_checkpoint(path)['w'].tolist() == [[0, 0], [0, 0]]


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_records_of_one_name_are_refused(tmp_path):
    path = write_zip(tmp_path / 'x.pth', pickled({}), {'data/0': b'a'})
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('x/data/0', b'b')
    with pytest.raises(CheckpointError, match='two of its records have one name'):
        read_checkpoint(path)


def test_records_of_the_same_bytes_are_refused(tmp_path):
    """Two entries of the archive's list may point to one record."""
    path = write_zip(tmp_path / 'x.pth', pickled({}), {'data/0': bytes(10_000)})
    with zipfile.ZipFile(path, 'a') as archive:
        copy_of_it = copy.copy(archive.getinfo('x/data/0'))
        copy_of_it.filename = 'x/data/1'
        archive.filelist.append(copy_of_it)
        archive._didModify = True
    with pytest.raises(CheckpointError, match='larger than the file'):
        read_checkpoint(path)


def test_another_codec_is_refused(tmp_path):
    data = optimizer(call('_codecs.encode', TEXT, b'X\x08\x00\x00\x00punycode'))
    with pytest.raises(CheckpointError, match='would run the codec punycode'):
        read_checkpoint(write_zip(tmp_path / 'x.pth', data, {}))


@pytest.mark.parametrize('order', [b'little', b'big'])
def test_another_byte_order_is_an_error(tmp_path, order):
    path = write_zip(tmp_path / 'x.pth', pickled({'a': 1}), {'byteorder': order})
    if order == b'little':
        assert read_checkpoint(path) == {'a': 1}
        return
    with pytest.raises(CheckpointError, match='another byte order'):
        read_checkpoint(path)


def test_a_legacy_file_whose_tensors_are_cut_off(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'a': torch.ones(8)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match='tensors are cut off'):
        load(path, tensors=False)  # without their bytes, only their place tells


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / 'x.pth'))
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(tmp_path / 'x.pth')


# ---------------------------------------------------------------- values that never end


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


OUTSIDE = b']q\x01' + b'(]q\x00h\x00e0h\x00' * 40 + b'0h\x01'  # the outermost list is first
PAIRS = doubled(b')', b'h\x00h\x00\x86', 40)
TEXT = b'X\x01\x00\x00\x00a'
NUMBERS = b'}(' + b''.join(b'I%d\nN' % n for n in range(2000)) + b'uq\x010'
ENDLESS = {
    'key': b'\x80\x02})' + b'\x85' * 1_000_000 + b'K\x01s.',
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
    'deep calls': optimizer(b'ctorch\nSize\n' * 10_000 + b')' + b'R\x85' * 10_000),
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
        process.join(5)
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
    *(np.array([]), np.zeros((0, 3), np.int64), b'', b'a', frozenset(), frozenset({1, (2, 'a')})),
    *({1, 2}, bytearray(), bytearray(b'\xff'), 1j),
]


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('value', PLAIN, ids=repr)
def test_plain_values_are_read_as_they_were(tmp_path, value, protocol):
    torch.save({'a': [value]}, tmp_path / 'x.pth', pickle_protocol=protocol)
    (read,) = read_checkpoint(tmp_path / 'x.pth')['a']
    assert type(read) is type(value)
    if isinstance(value, np.ndarray):
        assert (read.shape, read.dtype) == (value.shape, value.dtype)
    else:
        assert read == value


@pytest.mark.parametrize('name', ['bytes', 'bytearray', 'frozenset', 'set'])
def test_plain_values_are_not_made_of_sizes_or_codecs(tmp_path, name):
    for arguments in (b'J\xff\xff\xff\x7f', TEXT + b'X\x08\x00\x00\x00punycode'):
        path = write_zip(tmp_path / 'x.pth', optimizer(call(f'__builtin__.{name}', arguments)), {})
        with pytest.raises(CheckpointError, match=r'x\.pth'):
            read_checkpoint(path)


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


# ---------------------------------------------------------------- a thousand mutations


def renamed(content: dict, rng: random.Random) -> dict:
    state = content['state_dict']
    name = rng.choice(list(state))
    state[rng.choice(['', 'module.', 'x.']) + name[::-1]] = state.pop(name)
    return content


def reshaped(content: dict, rng: random.Random) -> dict:
    state = content['state_dict']
    name = rng.choice(list(state))
    state[name] = rng.choice([state[name].flatten(), state[name][None], torch.empty(0)])
    return content


def recast(content: dict, rng: random.Random) -> dict:
    state = content['state_dict']
    name = rng.choice(list(state))
    kinds = [torch.float16, torch.int8, torch.complex64, torch.bool]
    state[name] = rng.choice([*(state[name].to(kind) for kind in kinds), 'text', None, [1]])
    return content


def dropped(content: dict, rng: random.Random) -> dict:
    del content[rng.choice(list(content))]
    return content


def armed(content: dict, rng: random.Random) -> dict:
    place = rng.choice([content, content['state_dict'], content['meta']])
    place[rng.choice(['x', 'meta', 'weight'])] = Harm(rng.randrange(7))
    return content


def nested(content: dict, rng: random.Random) -> dict:
    """Some levels, up to what torch can write, of the same value once or twice in each."""
    value, times = rng.choice([[], (), {}]), rng.choice([1, 2])
    for _ in range(rng.choice([3, 30, 300])):
        value = rng.choice([[value] * times, (value,) * times, dict(a=value, b=value)])
    content[rng.choice(list(content))] = value
    return content


def endless(content: dict, rng: random.Random) -> dict:
    """A value that contains itself."""
    place = rng.choice([content, content['optimizer'], content['meta']])
    inner = []
    inner.append(rng.choice([inner, (inner,), dict(a=inner), place]))
    place[rng.choice(['x', *place])] = rng.choice([inner, place])
    return content


EDITS = (renamed, reshaped, recast, dropped, armed, nested, endless)


def mutated(whole: bytes, kind: str, rng: random.Random) -> bytes:
    """The bytes of a checkpoint after one accident or attack."""
    if kind == 'cut':
        return whole[: rng.randrange(len(whole))]
    if kind == 'flipped':
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 'pickle':  # flipped inside, with checksums that fit
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, 'w') as new:
            for name in old.namelist():
                content = bytearray(old.read(name))
                if name.endswith('data.pkl'):
                    for _ in range(rng.choice([1, 1, 3, 30])):
                        content[rng.randrange(len(content))] = rng.randrange(256)
                new.writestr(name, bytes(content))
        return buffer.getvalue()
    content = torch.load(io.BytesIO(whole), weights_only=False)
    buffer = io.BytesIO()
    torch.save(
        rng.choice(EDITS)(content, rng),
        buffer,
        _use_new_zipfile_serialization=rng.random() < 0.8,
    )
    return buffer.getvalue()


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(kind=st.sampled_from(['cut', 'flipped', 'pickle', 'edited']), seed=st.integers(0, 2**32))
def test_a_thousand_mutations_end_in_a_load_or_one_clear_error(small, kind, seed):
    whole, content, path, toy = small
    path.write_bytes(mutated(whole, kind, random.Random(seed)))
    try:
        got = read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert '\n' not in str(error)  # noqa: PT017
    else:
        assert isinstance(got, dict)
        if kind in ('cut', 'flipped'):  # the bytes that matter are those that were written
            assert_same(got['state_dict'], content['state_dict'])
        fits(toy, path)
        with contextlib.suppress(CheckpointError):
            CheckpointLoader.load_checkpoint(str(path))
    assert not Path(HARM).exists()


def fits(toy: torch.nn.Module, path: Path) -> None:
    """Loads it as the tools do: all weights of the model, or one clear error."""
    try:
        state = read_state_dict(path)
        check_fit(SimpleNamespace(model=toy), str(path), state)
    except (CheckpointError, UserError) as error:
        assert str(path) in str(error)  # noqa: PT017
        assert '\n' not in str(error)  # noqa: PT017
        return
    toy.load_state_dict(state, strict=False)
    assert all(torch.equal(p, state[name].to(p.dtype)) for name, p in toy.named_parameters())


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A tiny checkpoint with all that a run's has; and a folder to be harmed."""
    from mmengine.logging import HistoryBuffer

    load_without_code()
    folder = tmp_path_factory.mktemp('small')
    before = os.getcwd()
    os.chdir(folder)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    content = dict(
        meta=dict(iter=3, epoch=0, cfg='a = 1'),
        state_dict=model.state_dict(),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info={}),
        optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=0.1)]),
    )
    torch.save(content, 'whole.pth')
    yield Path('whole.pth').read_bytes(), content, folder / 'mutated.pth', copy.deepcopy(model)
    os.chdir(before)


# ---------------------------------------------------------------- the newest intact one


def write(folder: Path, name: str, iteration: int, intact: bool = True, time: int = 0) -> Path:
    path = folder / name
    torch.save(dict(meta=dict(iter=iteration), state_dict={}, message_hub={}), path)
    if not intact:
        path.write_bytes(path.read_bytes()[:-200])
    os.utime(path, (time, time))
    return path


def mark(folder: Path, target: Path | str, time: int) -> None:
    (folder / 'last_checkpoint').write_text(str(target))
    os.utime(folder / 'last_checkpoint', (time, time))


def test_newest_intact_checkpoint(tmp_path):
    assert newest_intact(tmp_path) == (None, [])
    write(tmp_path, 'non_finite_rank0.pth', 3, time=1)  # an alarm's
    assert newest_intact(tmp_path) == (None, [])
    first = write(tmp_path, 'iter_9.pth', 9, time=1)
    assert newest_intact(tmp_path) == (first, [])
    second = write(tmp_path, 'iter_10.pth', 10, time=2)
    mark(tmp_path, second, 3)
    write(tmp_path, 'best_mIoU_iter_10.pth', 10, time=9)
    assert newest_intact(tmp_path) == (second, [])
    third = write(tmp_path, 'iter_11.pth', 11, intact=False, time=4)  # not named yet
    found, passed_over = newest_intact(tmp_path)
    assert found == second
    assert len(passed_over) == 1
    assert str(third) in passed_over[0]
    write(tmp_path, 'iter_11.pth', 11, time=4)
    assert newest_intact(tmp_path) == (third, [])
    second.write_bytes(b'')
    third.unlink()
    found, passed_over = newest_intact(tmp_path)
    assert found == first
    assert 'iter_10.pth: the file is empty' in passed_over[0]
    first.write_bytes(b'x')
    with pytest.raises(CheckpointError, match='no intact checkpoint in'):
        newest_intact(tmp_path)


def test_leftovers_of_another_run_and_moved_folders(tmp_path):
    write(tmp_path, 'iter_160000.pth', 160000, time=1)  # an older run in the same folder
    here = write(tmp_path, 'iter_2.pth', 2, time=2)
    mark(tmp_path, '/moved/away/iter_2.pth', 3)
    assert newest_intact(tmp_path) == (here, [])
    copied = write(tmp_path, 'iter_1.pth', 1, time=5)  # copied after the marker
    assert newest_intact(tmp_path) == (here, [])
    assert copied.is_file()
    interrupted = write(tmp_path, 'interrupted.pth', 3, time=6)
    assert newest_intact(tmp_path) == (interrupted, [])


def test_a_copied_folder_goes_on_with_its_own_checkpoint(tmp_path):
    for name in ('original', 'copy'):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 'iter_9.pth', 9, time=1)
        write(tmp_path / name, 'iter_10.pth', 10, time=2)
        mark(tmp_path / name, tmp_path / 'original/iter_10.pth', 3)
    assert newest_intact(tmp_path / 'copy') == (tmp_path / 'copy/iter_10.pth', [])


def test_a_marker_names_a_file_elsewhere(tmp_path):
    (tmp_path / 'out').mkdir()
    write(tmp_path, 'iter_9.pth', 9, time=1)
    there = write(tmp_path / 'out', 'iter_10.pth', 10, time=2)
    mark(tmp_path, there, 3)
    assert newest_intact(tmp_path) == (there, [])


@pytest.mark.parametrize('name', ['', 'a' * 5000, '/a' * 5000, 'a\0b', 'a\nb', 'gone.pth'])
def test_a_marker_that_names_no_file_is_passed_over(tmp_path, name):
    mark(tmp_path, name, 3)
    with pytest.raises(CheckpointError, match='no intact checkpoint'):
        newest_intact(tmp_path)
    here = write(tmp_path, 'iter_9.pth', 9, time=1)
    found, (reason,) = newest_intact(tmp_path)
    assert found == here
    assert ('gone.pth: no such' if name == 'gone.pth' else 'last_checkpoint: names no') in reason
    assert '\n' not in reason
    assert len(reason) < 300


@pytest.mark.parametrize('name', ['a' * 5000 + '.pth', 'a\0b'])
def test_a_name_that_no_file_can_have_is_one_clear_error(name):
    with pytest.raises(CheckpointError, match='no such checkpoint file'):
        read_checkpoint(name)
