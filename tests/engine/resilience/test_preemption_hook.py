"""Signals in two ranks under torchrun, and signals that come more than once."""

import ctypes
import multiprocessing
import os
import random
import select
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.runs import MARKER
from mmslak.engine import Interrupted
from mmslak.engine.resilience import preemption_hook
from tests.engine.resilience import ranks
from tests.engine.resilience.test_exact_resume import Evaluated, validation
from tests.toy import Data, assert_same, build_runner


@pytest.fixture(autouse=True)
def usual_handlers():
    """A process's own handlers, where pytest's workers have theirs."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder: Path, *seconds: float) -> None:
    hooks = [ranks.Signals(*seconds), dict(type='mmslak.PreemptionHook')]
    ranks.train(build_runner, folder, hooks)


def test_no_rank_ends_before_the_checkpoint_is_written(tmp_path):
    """Else torchrun would end the one that writes."""
    ended = ranks.in_two_ranks('preemption', tmp_path)
    path = tmp_path / 'interrupted.pth'
    assert path.is_file(), ended.output[:3000]
    assert (tmp_path / MARKER).read_text() == str(path)
    assert read_checkpoint(path)['meta']['iter'] == 3
    assert 'SIGTERM after iteration 3' in ended.output


class InValidation(Hook):
    """Draws random numbers in a validation and sends SIGTERM in its first batch, or at its end."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        torch.rand(3), np.random.rand(), random.random()
        if not self.at_end:
            signal.raise_signal(signal.SIGTERM)

    def after_val_epoch(self, runner, metrics=None) -> None:
        if self.at_end:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize('at_end', [False, True])
def test_in_a_validation_it_saves_the_state_of_training(tmp_path, at_end):
    """Not the averaged weights that are validated, nor random numbers that are drawn there."""
    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=1)
    runner = build_runner(
        tmp_path,
        model=Evaluated(),
        ema=True,
        hooks=[
            InValidation(at_end),
            dict(type='mmslak.ExactResumeHook'),
            dict(type='mmslak.PreemptionHook'),
        ],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=10**6), checkpoint=checkpoint),
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=3),
        **validation(),
    )
    with pytest.raises(Interrupted, match='after iteration 3'):
        runner.train()
    saved, before = (read_checkpoint(tmp_path / f'{n}.pth') for n in ('interrupted', 'iter_3'))
    assert saved['exact_resume'].pop('validated') == at_end
    assert before['exact_resume'].pop('validated') is False
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'exact_resume'):
        assert_same(saved[key], before[key], key)


def test_signals_at_once_are_one(tmp_path, capfd):
    with pytest.raises(Interrupted, match='after iteration 3'):
        train(tmp_path, 0, 0.1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith('SIG')]
    assert line == (
        'SIGTERM: finishing this step, then saving; once more after 3 seconds to stop at once'
    )
    assert (tmp_path / 'interrupted.pth').is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class LongCall(Hook):
    """One call in C, as of torch, that no signal ends: a thread ends it when it is told to."""

    def __init__(self, told: threading.Event) -> None:
        self.told, self.was_told = told, False

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 2:
            library, barrier = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            library.pthread_barrier_init(barrier, None, 2)

            def end() -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                self.was_told = self.told.wait(1)
                library.pthread_barrier_wait(barrier)

            thread = threading.Timer(0.2, end)
            thread.start()
            library.pthread_barrier_wait(barrier)
            thread.join()


def test_in_a_long_call_it_says_so_within_a_second(tmp_path, monkeypatch):
    """Python runs the handler when the call is over."""
    told, said = threading.Event(), []
    monkeypatch.setattr(preemption_hook, '_say', lambda number: (said.append(number), told.set()))
    call = LongCall(told)
    with pytest.raises(Interrupted, match='after iteration 3'):
        ranks.train(build_runner, tmp_path, [call, dict(type='mmslak.PreemptionHook')])
    assert call.was_told
    assert said == [signal.SIGTERM]


def test_who_waited_for_signals_before_gets_them_too(tmp_path):
    """asyncio waits for the numbers of signals at such a pipe, during and after training."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.set_wakeup_fd(into)
    try:
        with pytest.raises(Interrupted):
            train(tmp_path, 0)
        assert select.select([out], [], [], 5)[0] == [out]
        # torch's data loader has a handler of SIGCHLD: other processes of the test may end, too.
        assert set(os.read(out, 64)) - {signal.SIGCHLD} == {signal.SIGTERM}
    finally:
        assert signal.set_wakeup_fd(-1) == into
        os.close(out), os.close(into)


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


class Groups(Data):
    """Writes down the process group that a sample is loaded in."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __getitem__(self, index: int) -> dict:
        with self.file.open('a') as file:
            file.write(f'{os.getpid()} {os.getpgid(0)}\n')
        return super().__getitem__(index)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_data_workers_have_a_group_of_their_own(tmp_path, by_epoch):
    """A signal to the group of the training process is not for them."""
    file = tmp_path / 'groups'
    loader = dict(
        batch_size=4, num_workers=2, dataset=Groups(file),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )  # fmt: skip
    length = dict(max_epochs=1) if by_epoch else dict(max_iters=4)
    hooks = [dict(type=f'mmslak.{name}') for name in ('PreemptionHook', 'ExactResumeHook')]
    build_runner(
        tmp_path, train_dataloader=loader, train_cfg=dict(by_epoch=by_epoch, **length), hooks=hooks
    ).train()
    # The last sample: MMEngine's loop may have begun to load before the hooks were asked.
    process, group = map(int, file.read_text().splitlines()[-1].split())
    assert os.getpgid(0) != process == group


class Forks(Hook):
    """Asks forked processes of a pool how they take SIGTERM, by which pools end them."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        with multiprocessing.get_context('fork').Pool(1) as pool:
            self.handler = pool.apply(signal.getsignal, (signal.SIGTERM,))
            self.pipe = pool.apply(signal.set_wakeup_fd, (-1,))


def test_sigterm_ends_forked_processes_at_once(tmp_path):
    """A handler in Python is not run where the signal comes just before a process waits.

    Nor do they write their signals into the pipe of the training process.
    """
    forks = Forks()
    ranks.train(build_runner, tmp_path, [dict(type='mmslak.PreemptionHook'), forks])
    assert forks.handler == signal.SIG_DFL
    assert forks.pipe == -1


class Fails(Hook):
    """An error in the third training step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 2:
            raise FloatingPointError('in a step')


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal; a background job inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fail(folder: Path) -> None:
    with pytest.raises(FloatingPointError):
        ranks.train(build_runner, folder, [Fails(), dict(type='mmslak.PreemptionHook')])


@pytest.mark.usefixtures('ctrl_c')
def test_ctrl_c_after_a_run_that_raised(tmp_path):
    """As in a notebook: there is no training that it could stop."""
    fail(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures('ctrl_c')
def test_a_run_after_one_that_raised(tmp_path):
    """It listens, and then the first Ctrl-C is nobody's again."""
    fail(tmp_path / 'failed')
    with pytest.raises(Interrupted, match='after iteration 3'):
        train(tmp_path / 'stopped', 0)
    assert (tmp_path / 'stopped/interrupted.pth').is_file()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Within(Hook):
    """Trains another model in the second iteration, which may fail."""

    def __init__(self, train) -> None:
        self.train = train

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == 1:
            self.train()


@pytest.mark.parametrize('fails', [False, True])
def test_a_run_within_a_run(tmp_path, fails):
    """The outer one listens again when the inner one is over."""
    hooks = [dict(type='mmslak.PreemptionHook')]
    inner = fail if fails else lambda folder: ranks.train(build_runner, folder, hooks)
    within = Within(lambda: inner(tmp_path / 'inner'))
    with pytest.raises(Interrupted, match='after iteration 3'):
        ranks.train(build_runner, tmp_path, [within, ranks.Signals(0), *hooks])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_each_run_counts_its_own_signals(tmp_path, monkeypatch):
    """The first one of the second run is no second one."""
    monkeypatch.setattr(preemption_hook, 'ONE_SIGNAL', 0.0)
    hook = preemption_hook.PreemptionHook()

    def end(number: int, frame: object) -> None:
        raise AssertionError('ended at once')

    before = signal.signal(signal.SIGTERM, end)
    try:
        for name in 'one', 'two':
            with pytest.raises(Interrupted, match='after iteration 3'):
                ranks.train(build_runner, tmp_path / name, [ranks.Signals(0), hook])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures('ctrl_c')
def test_a_process_forked_after_a_run_that_raised(tmp_path):
    fail(tmp_path)
    forks = Forks()
    try:
        forks.before_train_iter(None, 0)
        assert forks.handler == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
