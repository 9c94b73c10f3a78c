"""`mmslak check-dataset`."""

import json

import pytest
from mmengine.registry import DefaultScope

from mmslak.cli import check_dataset
from tests.datasets.test_samples import save
from tests.golden import ROOT

CONFIG = """
default_scope = 'mmdet'
model = dict(type='mmslak.SLaK')
train_dataloader = dict(dataset=dict(type='BaseDetDataset', ann_file={ann!r}, serialize_data=False,
    pipeline=[dict(type='mmcv.LoadImageFromFile')]))
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A config whose dataset has one picture; its annotations are what is given."""
    monkeypatch.chdir(ROOT)
    # The tool sets the scope of its process.
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    picture = save(tmp_path / 'x.png')

    def make(annotations: object = None) -> str:
        whole = dict(metainfo={}, data_list=[dict(img_path=str(picture))])
        text = json.dumps(whole if annotations is None else annotations)
        (tmp_path / 'ann.json').write_text(text)
        path = tmp_path / 'config.py'
        path.write_text(CONFIG.format(ann=str(tmp_path / 'ann.json')))
        return str(path)

    return make


def test_the_list_gets_its_folder(dataset, tmp_path):
    out = tmp_path / 'new/folder/bad.jsonl'
    argv = ['--split', 'train', '--workers', '1', '--out', str(out)]
    assert check_dataset.main([dataset(), *argv]) == 0
    (tmp_path / 'x.png').write_bytes(b'')
    assert check_dataset.main([dataset(), *argv]) == 1
    assert len(out.read_text().splitlines()) == 1


def test_what_cannot_be_checked_is_one_line(dataset, tmp_path, capsys):
    def says(*argv: object) -> str:
        assert check_dataset.main([*map(str, argv), '--split', 'train']) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert 'a folder' in says(dataset(), '--out', tmp_path)
    assert 'ann.json/bad' in says(dataset(), '--out', tmp_path / 'ann.json/bad')
    config = dataset(annotations=[1])
    assert 'train_dataloader.dataset (BaseDetDataset) cannot be built: TypeError' in says(config)


@pytest.mark.parametrize('workers', ['0', '-1', 'many'])
def test_workers_are_at_least_one(dataset, capsys, workers):
    with pytest.raises(SystemExit) as stop:
        check_dataset.main([dataset(), '--workers', workers])
    assert stop.value.code == 2
    assert '--workers' in capsys.readouterr().err.splitlines()[-1]
