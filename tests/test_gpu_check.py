"""benchmarks/gpu_check.py: tried without a GPU, on a machine that has torch and triton alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmslak.ops import triton_backend

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'benchmarks' / 'gpu_check.py'
LIBRARIES = ('mmcv', 'mmengine', 'mmseg', 'mmdet', 'mmpretrain', 'torchvision')


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    return gpu_check


def test_every_step_on_a_bare_machine(tmp_path):
    try:
        triton_backend._kernels()
    except ValueError as error:
        pytest.skip(str(error))
    for library in LIBRARIES:
        (tmp_path / f'{library}.py').write_text(f"raise ImportError('{library} is not here')")
    out = tmp_path / 'result.json'
    done = subprocess.run(
        [sys.executable, str(SCRIPT), '--device', 'cpu', '--tiny', '--out', str(out)],
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(out.read_text())['steps']
    assert list(steps) == [
        *['ceilings', 'compile', 'correctness', 'repeats', 'graphs', 'tiles', 'tables', 'host']
    ]
    assert {step['status'] for step in steps.values()} == {'done'}
    assert all(step['results'] for step in steps.values())
    assert 'failed' not in out.read_text()
    errors = [one for found in steps['correctness']['results'].values() for one in found.values()]
    assert 0 < max(errors) < 1
    bits = {name: same for name, same in steps['repeats']['results'].items() if 'float32' in name}
    assert set(bits.values()) == {True}


def slow(run):
    yield 'first', 1
    time.sleep(60)
    yield 'second', 2


def raising(run):
    yield 'first', 1
    raise RuntimeError('an illegal memory access')


def dying(run):
    yield 'first', 1
    os._exit(7)


@pytest.mark.parametrize(
    ('step', 'status'),
    [
        (slow, 'out of time'),
        (raising, 'an illegal memory access'),
        (dying, 'failed: the process ended with code 7'),
    ],
)
def test_a_step_that_fails_keeps_its_results_and_lets_the_next_go_on(
    gpu_check, monkeypatch, tmp_path, step, status
):
    def fine(run):
        yield 'number', float('nan')

    monkeypatch.setattr(gpu_check, 'STEPS', {'bad': (step, 2), 'next': (fine, 2)})
    out = tmp_path / 'result.json'
    start = time.monotonic()
    gpu_check.main(['--device', 'cpu', '--tiny', '--seconds', '4', '--out', str(out)])
    assert time.monotonic() - start < 20
    bad, following = json.loads(out.read_text())['steps'].values()
    assert status in bad['status']
    assert bad['results'] == {'first': 1}
    assert following['status'] == 'done'
    assert following['results'] == {'number': 'nan'}


def test_budgets_fit_eight_minutes(gpu_check):
    assert sum(seconds for _, seconds in gpu_check.STEPS.values()) <= 480


def test_errors_are_relative_and_see_a_nan(gpu_check):
    wanted = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    assert gpu_check.error([torch.tensor([1.0, -3.0]), torch.tensor([2.0])], wanted) == 0.25
    assert gpu_check.error([torch.tensor([1.0, float('nan')]), wanted[1]], wanted) != 0.0
