"""What a config gets before its runner is built; whole runs are in test_train_and_test.py."""

import logging
import sys

import pytest

from mmslak.apis.config import LOADERS
from mmslak.apis.prints import PRINTING, redirect_prints
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


@pytest.mark.parametrize(
    ('message', 'is_shown'),
    [
        ('Iter(test) [50/250]    eta: 0:00:10  time: 0.1  data_time: 0.0', True),
        ('Iter(test) [250/250]    mIoU: 40.0  data_time: 0.0  time: 0.1', False),
        ('Epoch(test) [9/9]    coco/bbox_mAP: 0.4  data_time: 0.0  time: 0.1', False),
        ('Iter(val) [250/250]    mIoU: 40.0  data_time: 0.0  time: 0.1', True),
        ('bbox_mAP_copypaste: 0.400 0.500', False),
        ('"FileClient" will be deprecated in future. Please use io functions', False),
        ('"HardDiskBackend" is the alias of "LocalBackend" and', False),
        ('Distributed training is not used, all SyncBatchNorm (SyncBN) layers', False),
        ('The prefix is not set in metric class IoUMetric.', False),
        ('Config:\nmodel = dict()', False),
        ('Checkpoints will be saved to work', True),
    ],
)
def test_what_is_for_the_log_file_alone(message, is_shown):
    record = logging.makeLogRecord(dict(msg=message))
    assert runner._is_for_screen(record) == is_shown


def test_what_pycocotools_prints_is_in_the_log_file(capsys, caplog):
    coco = pytest.importorskip('pycocotools.coco')
    assert coco.__name__ in PRINTING
    logger = logging.getLogger('test of prints')
    try:
        redirect_prints(logger)
        with caplog.at_level(logging.INFO, logger.name):
            coco.COCO().createIndex()
        assert [record.getMessage() for record in caplog.records] == [
            'creating index...',
            'index created!',
        ]
        assert not any(map(runner._is_for_screen, caplog.records))
        redirect_prints()
        coco.COCO().createIndex()
        assert len(caplog.records) == 2
        assert capsys.readouterr().out == ''
    finally:
        for name in PRINTING:
            vars(sys.modules.get(name, coco)).pop('print', None)
