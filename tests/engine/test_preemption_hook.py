"""Signals in two ranks under torchrun, and signals that come more than once."""

import signal
from pathlib import Path

import pytest

from mmslak.checkpoint import MARKER, read_checkpoint
from mmslak.engine import Interrupted, preemption_hook
from tests.engine import ranks
from tests.toy import build_runner


def train(folder: Path, *seconds: float) -> None:
    hooks = [ranks.Signals(*seconds), dict(type='mmslak.PreemptionHook')]
    ranks.train(build_runner, folder, hooks)


def test_no_rank_ends_before_the_checkpoint_is_written(tmp_path):
    """Else torchrun would end the one that writes."""
    process = ranks.in_two_ranks('preemption', tmp_path)
    path = tmp_path / 'interrupted.pth'
    assert path.is_file(), process.stderr[:3000]
    assert (tmp_path / MARKER).read_text() == str(path)
    assert read_checkpoint(path)['meta']['iter'] == 3
    assert 'SIGTERM after iteration 3' in process.stderr


def test_signals_at_once_are_one(tmp_path):
    with pytest.raises(Interrupted, match='after iteration 3'):
        train(tmp_path, 0, 0.1)
    assert (tmp_path / 'interrupted.pth').is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_later_one_ends_the_run(tmp_path, monkeypatch):
    class EndedError(Exception):
        pass

    def end(number: int, frame: object) -> None:
        raise EndedError

    monkeypatch.setattr(preemption_hook, 'ONE_SIGNAL', 0.1)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(EndedError):
            train(tmp_path, 0, 0.2)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / 'interrupted.pth').exists()
