import re

import pytest

from mmslak.ops import choice, plans, tune
from tests import forks
from tests.tuning_state import begin_anew


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    begin_anew(monkeypatch, tmp_path)


def test_kernels_are_measured_and_shown(capsys, tmp_path):
    tune.main(['--kernels', '5x3', '3', '--shape', '1', '4', '8', '8', '--device', 'cpu'])
    assert 'measured ' in capsys.readouterr().out
    tune.main(['--show'])
    shown = capsys.readouterr().out
    assert f'{tmp_path}/tuning/' in shown
    assert '  threads: ' in shown
    for line in (
        'float32 nhwc 5x3 forward c4 n1 h8 w8: ',
        'float32 nhwc 5x3+3x3 branches training-xw c4 n1 h8 w8: ',
    ):
        assert line in shown


def test_what_is_measured_is_found_by_a_network(capsys):
    """Also where 60 s are over, and other settings hold."""
    arguments = ['--kernels', '5x3', '--shape', '2', '4', '8', '8', '--device', 'cpu']
    tune.main([*arguments, '--nchw', '--dtype', 'bfloat16'])
    before = choice.spent()[0]
    tune.main([*arguments, '--nchw', '--dtype', 'bfloat16'])
    assert choice.spent()[0] == before > 0


def test_nothing_to_show(capsys, tmp_path):
    tune.main(['--show'])
    assert capsys.readouterr().out == f'nothing was measured yet: no choices in {tmp_path}/tuning\n'


def test_a_file_that_cannot_be_shown(capsys, tmp_path):
    (tmp_path / 'tuning').mkdir()
    (tmp_path / 'tuning/a.json').write_text('{"plans": 3}')
    tune.main(['--show'])
    assert 'a.json cannot be read' in capsys.readouterr().out


def test_what_was_measured_becomes_a_shipped_table(monkeypatch, capsys, tmp_path):
    tables = tmp_path / 'tables'
    tables.mkdir()
    arguments = ['--kernels', '5x3', '--shape', '1', '4', '8', '8', '--device', 'cpu']
    tune.main([*arguments, '--export', str(tables / 'here.json')])
    assert re.search(rf'^{tables}/here.json: \d+ choices of .', capsys.readouterr().out, re.M)
    measured = choice.spent()[0]
    assert measured > 0
    begin_anew(monkeypatch, tmp_path / 'another cache')
    monkeypatch.setattr(plans, 'TABLES', tables)
    tune.main(arguments)
    assert choice.spent()[0] == 0


def test_nothing_to_export(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        tune.main(['--device', 'cpu', '--export', str(tmp_path / 'here.json')])
    assert stopped.value.code == 2
    assert 'nothing was measured on this machine' in capsys.readouterr().err
    assert not (tmp_path / 'here.json').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'expected --kernels and --shape, a CONFIG, --show or --export'),
        (['--kernels', '4x3', '--shape', '1', '1', '8', '8'], "invalid _kernel value: '4x3'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_a_config_is_handed_on():
    command = ['-m', 'mmslak.ops.tune', 'absent.py', '--shape', '1', '3', '8', '8']
    ended = forks.run(forks.program, *command)
    assert ended.statuses == [2]
    assert 'error: ' in ended.output
    assert 'absent.py' in ended.output
