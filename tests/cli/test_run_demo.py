"""The demo: a few real steps of the whole, and its bookkeeping without any training."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from rich.console import Console

from mmslak.cli import run_demo as demo
from tests import forks
from tests.cli.test_demo_page import check_addresses

ROOT = Path(__file__).parents[2]
INTERRUPTED = 'stopped; run the command again, finished steps are kept\n'


def test_quick_demo_runs_and_then_skips(quick_demo, monkeypatch, capsys):
    # An edit of the sources between the two runs, by someone at work on them, is not the point.
    monkeypatch.setattr(demo, 'sources', lambda: 'unchanged')
    monkeypatch.setattr(demo, 'subprocess', forks.SUBPROCESS)
    work = quick_demo / 'work'
    arguments = ['--quick', '--data', str(quick_demo / 'data'), '--work-dir', str(work)]
    status = demo.main(arguments)
    output = capsys.readouterr()
    assert status == 0, output
    for line in ('Step 5 of 5', 'accuracy', 'with pretraining', 'from scratch', 'Results:'):
        assert line in output.out
    picture = np.asarray(Image.open(work / 'digit_scenes.png'))
    assert picture.min() < 50
    assert picture.max() > 200
    assert np.asarray(Image.open(work / 'erf/erf.png')).ndim == 3
    assert 'data:image/png' in (work / 'sparsity.html').read_text()
    addresses = check_addresses(work / 'index.html')
    assert addresses[:4] == ['digits.png', 'digit_scenes.png', 'erf/erf.png', 'sparsity.html']
    assert len(addresses) == 7
    # UperNet's backbone came from the pretraining run.
    log = (work / 'upernet_pretrained/train.log').read_text()
    assert re.search(r'slak_digits/epoch_1\.pth: \d+ of \d+ tensors', log)
    assert 'epoch_1.pth' not in (work / 'upernet_from_scratch/train.log').read_text()

    monkeypatch.setattr(demo, 'call', None)  # nothing is left to do
    assert demo.main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count('done before') == 4
    scores = [line for line in output.out.splitlines() if line.startswith('Held-out')]
    assert scores == [line for line in again.splitlines() if line.startswith('Held-out')]


@pytest.mark.parametrize(
    ('logged', 'epochs', 'text'),
    [
        (
            '11/26 18:42:42 - mmengine - INFO - Epoch(train)  [3][ 20/120]  lr: 2.0e-03  '
            'eta: 0:01:10  time: 0.3  grad_norm: 3.6  loss: 2.3169',
            12,
            'training: iteration 260 of 1440, loss 2.3169, 0:01:10 left',
        ),
        (
            'Iter(train) [ 20/400]  lr: 2.0e-05  eta: 0:00:38  loss: 3.36  decode.loss_ce: 2.4',
            1,
            'training: iteration 20 of 400, loss 3.36, 0:00:38 left',
        ),
        ('Iter(test) [ 5/60]    eta: 0:00:01  time: 1', 1, 'test: iteration 5 of 60, 0:00:01 left'),
        ('Iter(test) [60/60]    mIoU: 71.8000', 1, None),
        ('Saving checkpoint at 400 iterations', 1, None),
    ],
)
def test_progress_is_read_from_the_log(logged, epochs, text):
    assert demo.progress(logged, epochs) == text


def stand_in(code: str, monkeypatch):
    """Lets `call` run this code in place of a command."""
    monkeypatch.setattr(demo, 'command_of', lambda *arguments: [sys.executable, '-c', code])


def test_a_command_is_run_by_this_package(tmp_path, monkeypatch):
    """And not by another one that the working directory holds, such as a clone."""
    (tmp_path / 'mmslak').mkdir()
    for name in ('__init__', '__main__'):
        (tmp_path / 'mmslak' / f'{name}.py').write_text('raise SystemExit("another package")')
    monkeypatch.chdir(tmp_path)
    assert 'CONFIG' in demo.call('train', ['--help'], tmp_path / 'train.log')


def test_progress_is_shown_now_and_then_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    code = "print('Iter(train) [1/2]  eta: 0:00:01  loss: 1'); print('Iter(train) [2/2]  eta: 0  ')"
    stand_in(code, monkeypatch)
    monkeypatch.setattr(demo, 'SECONDS_BETWEEN_LINES', 0)
    assert demo.call('train', [], tmp_path / 'train.log').count('Iter') == 2
    assert capsys.readouterr().out.splitlines() == [
        '  training: iteration 1 of 2, loss 1, 0:00:01 left',
        '  training: iteration 2 of 2, 0 left',
    ]
    monkeypatch.setattr(demo, 'SECONDS_BETWEEN_LINES', 60)
    demo.call('train', [], tmp_path / 'train.log')
    assert capsys.readouterr().out == ''


def test_progress_is_one_line_on_a_terminal(tmp_path, monkeypatch, capsys):
    """The line is erased and drawn anew, in the end it is gone."""
    terminal = io.StringIO()
    monkeypatch.setattr(demo, 'Console', lambda: Console(file=terminal, force_terminal=True))
    said = 'print("Iter(train) [1/2]  eta: 0:00:01  loss: 1", flush=True)'
    stand_in(f'import time; time.sleep(1); {said}; time.sleep(0.5)', monkeypatch)
    demo.call('train', [], tmp_path / 'train.log')
    drawn = terminal.getvalue()
    assert 'train: starting' in drawn
    assert drawn.index('iteration 1 of 2, loss 1') < drawn.rindex('\x1b[2K')
    assert capsys.readouterr().out == ''


def fake_tools(calls: list, score: str = 'mIoU: 71.5\n'):
    """Stands in for `call`: leaves what `train` leaves, prints what `test` prints."""

    def call(command: str, arguments: list[str], log: Path, epochs: int = 1) -> str:
        calls.append(command)
        (log.parent / 'iter_1.pth').write_bytes(b'weights')
        (log.parent / 'last_checkpoint').write_text(str(log.parent / 'iter_1.pth'))
        return score

    return call


def test_a_step_is_redone_when_anything_changed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, 'call', fake_tools(calls))

    def step(options: list[str], stamp: str) -> float:
        _, (score,) = demo.train_and_test(demo.SCENES, tmp_path / 'step', options, ['mIoU'], stamp)
        return score

    assert step([], 'data') == 71.5
    assert step([], 'data') == 71.5
    assert calls == ['train', 'test']
    step(['randomness.seed=1'], 'data')
    step(['randomness.seed=1'], 'other data')
    assert len(calls) == 6
    (tmp_path / 'step/iter_1.pth').unlink()
    step(['randomness.seed=1'], 'other data')
    assert len(calls) == 8
    assert json.loads((tmp_path / 'step/done.json').read_text())['scores'] == [71.5]


def test_every_metric_is_read_under_its_own_name(tmp_path, monkeypatch):
    printed = 'coco/bbox_mAP: 0.1\ncoco/bbox_mAP_50: 0.5\ncoco/segm_mAP_50: 0.25\n'
    monkeypatch.setattr(demo, 'call', fake_tools([], printed))
    metrics = ['coco/segm_mAP_50', 'coco/bbox_mAP_50']
    _, scores = demo.train_and_test(demo.SCENES, tmp_path / 'step', [], metrics, 'data')
    assert scores == [0.25, 0.5]
    assert demo.described(metrics, scores) == 'coco/segm_mAP_50 0.25, coco/bbox_mAP_50 0.5'


def test_one_word_changes_the_backbone_of_every_run():
    args = demo.parse(demo.build_parser(), ['--backbone', 'mmslak.PeLK'])
    assert 'model.backbone.type=mmslak.PeLK' in demo.options(args, 'cls', ())
    assert args.work_dir.name == 'demo_pelk'
    usual = demo.parse(demo.build_parser(), [])
    assert args.data == usual.data
    assert not any('backbone' in option for option in demo.options(usual, 'cls', ()))
    for config in (demo.DIGITS, demo.SCENES):
        assert Config.fromfile(config).model.backbone.type == demo.BACKBONE


@pytest.mark.parametrize(
    ('accuracy', 'miou', 'status', 'message'),
    [(95, 70, 0, ''), (89.9, 70, 1, 'accuracy'), (95, 59.9, 1, 'mIoU')],
)
def test_exit_status_tells_whether_the_bars_are_met(
    monkeypatch, capsys, accuracy, miou, status, message
):
    monkeypatch.setattr(demo, 'run', lambda args: dict(accuracy=accuracy, mIoU=miou))
    assert demo.main([]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('name', ['run_demo_detection', 'run_demo_compact'])
def test_an_interrupt_of_the_others_is_that_line(monkeypatch, capsys, name):
    module = importlib.import_module(f'mmslak.cli.{name}')

    def run(args) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'run', run)
    assert module.main(['--quick']) == 130
    assert capsys.readouterr().err == INTERRUPTED


def test_an_interrupt_is_one_line(tmp_path):
    """Ctrl-C while a tool runs, as the terminal sends it: to the demo and to the tool."""
    data, work = tmp_path / 'data', tmp_path / 'work'
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / 'tools/run_demo.py',
            '--quick',
            f'--data={data}',
            f'--work-dir={work}',
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell without job control has its background jobs ignore Ctrl-C, and us with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = work / 'slak_digits/train.log'
    while not log.is_file() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == INTERRUPTED


def test_a_failing_tool_shows_the_end_of_its_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, 'subprocess', forks.SUBPROCESS)
    with pytest.raises(demo.DemoError, match=r'mmslak train failed.*train\.log'):
        demo.call('train', [str(tmp_path / 'missing.py')], tmp_path / 'train.log')
    assert 'missing.py' in capfd.readouterr().err


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / 'mine.txt').write_text('mine')
    arguments = ['--quick', '--data', str(tmp_path), '--work-dir', str(tmp_path / 'work')]
    assert demo.main(arguments) == 2
    assert 'holds something else' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
