"""What a config gets before its runner is built; whole runs are in test_train_and_test.py."""

import pytest

from mmslak.apis.config import LOADERS
from mmslak.cli import runner, train
from mmslak.cli.runner import load_config


@pytest.mark.parametrize(('there', 'workers'), [(2, 2), (4, 4), (64, 4)])
def test_no_more_data_workers_than_cores(there, workers, monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(runner, 'cores', lambda: there)
    cfg = load_config(train.build_parser().parse_args(['mmslak::upernet_slak_t_ade20k']))
    assert [cfg[name].num_workers for name in LOADERS] == [workers] * 3
    said = 'data workers: 2 in place of 4, one for each core\n'
    assert capsys.readouterr().out == (said if workers < 4 else '')
