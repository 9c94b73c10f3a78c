"""That a training starts, and how long it takes, said once after its third step."""

from datetime import datetime

import pytest
from mmengine.hooks import Hook

from mmslak.engine import time_estimate_hook
from mmslak.engine.time_estimate_hook import duration, estimate
from tests.toy import train

NOW = datetime(2026, 11, 27, 15, 0)


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (4, '4 s'),
        (89, '89 s'),
        (90, '2 min'),
        (2400, '40 min'),
        (5400, '1.5 h'),
        (100000, '27.8 h'),
        (302400, '3.5 days'),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_line():
    assert estimate(2.13, 1130, 1127, NOW) == (
        'a step takes about 2.1 s: about 40 min in all without validations, ends at 15:40'
    )
    assert estimate(0.25, 4, 1, NOW).startswith('a step takes about 0.25 s: about 1 s in all')
    assert estimate(72, 1000, 997, NOW).endswith(
        '20.0 h in all without validations, ends at November 28, 10:56'
    )


class Rehearsed(Hook):
    priority = 'LOWEST'

    def before_train(self, runner) -> None:
        runner.logger.info('rehearsed')


@pytest.mark.parametrize(('iterations', 'said'), [(2, 0), (3, 0), (4, 1), (9, 1)])
@pytest.mark.parametrize('timer', [True, False])
def test_once_after_the_third_step(tmp_path, iterations, said, timer):
    hooks = [dict(type='mmslak.TimeEstimateHook')]
    hooks_of_mmengine = {} if timer else dict(timer=None)
    train(tmp_path, iters=iterations, hooks=hooks, default_hooks=hooks_of_mmengine)
    (log,) = tmp_path.glob('*/*.log')
    lines = [line for line in log.read_text().splitlines() if 'a step takes about' in line]
    assert len(lines) == said * timer
    starts = [line for line in log.read_text().splitlines() if 'training starts' in line]
    estimated = '; the first estimate of its time comes after step 3' * (said * timer)
    assert [line.partition('training starts')[2] for line in starts] == [estimated]
    assert 'the first step took' not in log.read_text()


def test_a_slow_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(time_estimate_hook, 'SLOW', 0.0)
    train(tmp_path, iters=3, hooks=[dict(type='mmslak.TimeEstimateHook')])
    (log,) = tmp_path.glob('*/*.log')
    (line,) = [line for line in log.read_text().splitlines() if 'the first step took' in line]
    assert line.endswith(' s')


def test_the_start_is_said_after_the_rehearsal(tmp_path):
    hooks = [dict(type='mmslak.TimeEstimateHook'), Rehearsed()]
    train(tmp_path, iters=1, hooks=hooks)
    (log,) = tmp_path.glob('*/*.log')
    text = log.read_text()
    assert 0 < text.index('rehearsed') < text.index('training starts')


@pytest.mark.parametrize(('iterations', 'told'), [(1, 1), (3, 1)])
def test_what_was_measured_is_told_after_the_first_step(tmp_path, monkeypatch, iterations, told):
    calls = []
    monkeypatch.setattr(time_estimate_hook, 'tell_measured', lambda: calls.append(1))
    train(tmp_path, iters=iterations, hooks=[dict(type='mmslak.TimeEstimateHook')])
    assert len(calls) == told
