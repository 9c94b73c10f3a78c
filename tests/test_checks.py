"""What the checks of a config say to do; more of their messages are tested in test_tools.py."""

import pytest
from mmengine.config import Config

import mmslak  # noqa: F401
from mmslak import checks
from mmslak.datasets.catalog import DATASETS
from tests.golden import ROOT

# name for tools/prepare_data.py: a config that needs the data, the key that moves them.
NEEDED_BY = {
    'ade20k': ('upernet_slak_t_ade20k', 'data_root'),
    'voc2007': ('faster_rcnn_slak_t_voc07', 'data_root'),
    'coco': ('cascade_mask_rcnn_slak_t_coco', 'data_root'),
    'imagenet': ('slak_t_imagenet', 'train_dataloader.dataset.data_root'),
}


def complaint(cfg: Config) -> str:
    with pytest.raises(checks.UserError) as caught:
        checks.check_datasets(cfg, ['train_dataloader'])
    return str(caught.value)


@pytest.mark.parametrize('name', NEEDED_BY)
def test_missing_data_name_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, key = NEEDED_BY[name]
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    said = 'says how to get it' if name == 'imagenet' else '--download; '
    assert f'python tools/prepare_data.py {name} {said}' in complaint(cfg)

    checks.apply_options(cfg, {key: '/elsewhere'})
    assert f'python tools/prepare_data.py {name} --root /elsewhere {said}' in complaint(cfg)


def test_of_two_years_the_missing_one_is_named(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/faster_rcnn_slak_t_voc0712.py')
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (tmp_path / 'VOC2007' / part).mkdir(parents=True)
        (tmp_path / 'VOC2007' / part / 'trainval.txt').touch()
    checks.apply_options(cfg, dict(data_root=str(tmp_path)))
    assert f'python tools/prepare_data.py voc2012 --root {tmp_path} --download' in complaint(cfg)


def test_data_of_ones_own_are_not_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for detector in ('faster_rcnn', 'cascade_mask_rcnn'):
        cfg = Config.fromfile(ROOT / f'configs/demo/{detector}_slak_digit_scenes.py')
        message = complaint(cfg)
        assert 'data/digit_scenes' in message
        assert 'prepare_data' not in message


@pytest.mark.parametrize('listed', [False, True])
def test_missing_weights_name_the_whole_init_cfg(listed):
    init_cfg = dict(type='Pretrained', checkpoint='absent.pth')
    cfg = Config(dict(model=dict(backbone=dict(init_cfg=[init_cfg] if listed else init_cfg))))
    with pytest.raises(checks.UserError, match=r'--cfg-options model\.backbone\.init_cfg=None$'):
        checks.check_pretrained(cfg)


def test_the_table_of_trees_names_what_there_is():
    names = {name for folders, _ in checks.TREES.values() for name in folders.values()}
    assert names == set(DATASETS)
