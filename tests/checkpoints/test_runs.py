"""Checkpoints in work folders: the newest intact one, and what can be resumed."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmslak.checkpoints import runs
from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.runs import newest_intact, warn_of_refused
from mmslak.errors import CheckpointError
from tests.checkpoints.pickles import Harm

REFUSED = {
    'range': (range(3), 'would run'),
    'date': (np.datetime64('2020-01-01'), 'datetime64|of type M8'),
    'objects': (np.array([None, 1]), 'an array of type O8'),
    'hook': (Harm(0), r'would run \w+.mkdir'),
}


def message_hub(**values: object) -> dict:
    """A checkpoint with these values in its message hub."""
    scalars = {'train/loss': HistoryBuffer([1.0], [1])}
    model, hub = torch.nn.Linear(2, 2), dict(log_scalars=scalars, runtime_info=values)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step(lambda: model(torch.ones(2)).sum().backward())
    state = dict(meta={}, state_dict=model.state_dict(), optimizer=optimizer.state_dict())
    return dict(state, message_hub=hub)


@pytest.mark.parametrize('kind', REFUSED)
def test_it_says_what_will_not_be_read_back(tmp_path, monkeypatch, kind):
    lines = []
    monkeypatch.setattr(runs, 'print_log', lambda text, logger, level: lines.append(text))
    value, reason = REFUSED[kind]
    saved = message_hub(bad=value, nested=dict(good=np.array([]), bad=[value]), iter=3)
    warn_of_refused(saved)
    (said,) = lines
    for place in ('bad', 'nested.bad'):
        assert re.search(rf'message_hub\.runtime_info\.{place} \([^()]*({reason})', said)
    assert not re.search('good|iter|optimizer|log_scalars', said)
    torch.save(saved, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth'):
        read_checkpoint(tmp_path / 'x.pth')


def test_it_says_nothing_of_what_will_be_read_back(monkeypatch):
    monkeypatch.setattr(runs, 'print_log', None)
    warn_of_refused(message_hub(a=np.array([]), b=b'', c=frozenset(), d=Path('a')))


def test_values_that_contain_themselves_will_not_be_read_back(monkeypatch):
    lines = []
    monkeypatch.setattr(runs, 'print_log', lambda text, logger, level: lines.append(text))
    endless = {}
    endless['a'] = endless
    warn_of_refused(message_hub(endless=endless))
    assert 'message_hub.runtime_info.endless.a (a value contains itself' in lines[0]


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
