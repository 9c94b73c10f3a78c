import json

import pytest

from mmslak.cli import tune
from mmslak.ops import choice
from tests.tuning_state import begin_anew

MODEL = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmslak.SLaK',
        arch=dict(depths=[1, 1, 1, 1], dims=[4, 4, 4, 4]),
        kernel_sizes=(9, 7, 7, 7),
    ),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=5),
)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    begin_anew(monkeypatch, tmp_path / 'cache')
    path = tmp_path / 'config.py'
    path.write_text(MODEL)
    return path


def measured(tmp_path):
    (file,) = (tmp_path / 'cache/tuning').glob('*.json')
    return sorted(json.loads(file.read_text())['plans'])


def test_every_stage_in_training_and_prediction(config, tmp_path, capsys):
    assert tune.main([str(config), '--device', 'cpu', '--shape', '2', '3', '64', '64']) == 0
    assert 'measured ' in capsys.readouterr().out
    keys = measured(tmp_path)
    for size, kernels in ((16, '9x5+5x9'), (8, '7x5+5x7'), (4, '7x5+5x7'), (2, '7x5+5x7')):
        place = f'c5 n2 h{size} w{size}'
        assert any(kernels in k and 'sum forward' in k and place in k for k in keys)
        assert any(kernels in k and 'training-xw' in k and place in k for k in keys)
    before = choice.spent()[0]
    assert tune.main([str(config), '--device', 'cpu', '--shape', '2', '3', '64', '64']) == 0
    assert choice.spent()[0] == before


def test_a_table_to_ship(config, tmp_path, capsys):
    table = tmp_path / 'table.json'
    shape = ['--shape', '1', '3', '32', '32', '--no-train']
    assert tune.main([str(config), '--device', 'cpu', *shape, '--export', str(table)]) == 0
    assert sorted(json.loads(table.read_text())['plans']) == measured(tmp_path)
    assert f'{table}: ' in capsys.readouterr().out


def test_settings(config, tmp_path, capsys):
    options = ['--no-train', '--amp', 'bfloat16', '--show']
    shapes = ['--shape', '1', '3', '32', '32', '--shape', '1', '3', '64', '32']
    assert tune.main([str(config), '--device', 'cpu', *shapes, *options]) == 0
    keys = measured(tmp_path)
    assert all(key.startswith('bfloat16') and 'training' not in key for key in keys)
    assert {key.split()[-2] for key in keys if '9x5' in key} == {'h8', 'h16'}
    assert 'bfloat16 ' in capsys.readouterr().out


def test_accelerated_networks(config, tmp_path):
    config.write_text(
        MODEL.replace("'mmslak.SLaK'", "'ConvNeXt'")
        .replace('        kernel_sizes=(9, 7, 7, 7),\n', '')
        .replace('dims', 'channels')
        .replace('in_channels=5', 'in_channels=4')
        + "custom_hooks = [dict(type='mmslak.AccelerateHook')]\n"
    )
    assert tune.main([str(config), '--device', 'cpu', '--shape', '1', '3', '64', '64']) == 0
    assert any('7x7 training-xw' in key for key in measured(tmp_path))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'expected a CONFIG with --shape N C H W, --show or --export'),
        (['config.py'], '--shape: expected N C H W above 0'),
        (['--export', 'table.json', '--device', 'cpu'], '--export: nothing was measured'),
        (['config.py', '--shape', '1', '4', '64', '64'], 'does not run on 1×4×64×64'),
    ],
)
def test_errors(config, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(config.parent)
    try:
        status = tune.main(arguments)
    except SystemExit as error:  # of the parser
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
