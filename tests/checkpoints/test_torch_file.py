"""Files of torch.save from strangers: read as data, refused, or one clear error; never run."""

import contextlib
import copy
import io
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmslak.checkpoints.files import read_checkpoint, read_state_dict
from mmslak.checkpoints.schemes import load_without_code
from mmslak.checkpoints.torch_file import load
from mmslak.checkpoints.whole_model import check_fit
from mmslak.errors import CheckpointError, UserError
from tests.checkpoints.pickles import HARM, Harm, pickled, tensor, write_zip
from tests.toy import assert_same, build_runner


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
    with pytest.raises(CheckpointError, match='31 bytes, 32 expected'):
        read_checkpoint(path)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / 'x.pth'))
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(tmp_path / 'x.pth')


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
        check_fit(toy, str(path), state)
    except (CheckpointError, UserError) as error:
        assert str(path) in str(error)  # noqa: PT017
        assert '\n' not in str(error)  # noqa: PT017
        return
    toy.load_state_dict(state, strict=False)
    assert all(torch.equal(p, state[name].to(p.dtype)) for name, p in toy.named_parameters())


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A tiny checkpoint with all that a run's has; and a folder to be harmed."""
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
