"""What the checks of a config say to do; more of them are in test_train_and_test.py."""

import re

import pytest
from mmengine.config import Config

from mmslak import errors
from mmslak.apis import options
from mmslak.apis.config import check_scope
from mmslak.apis.options import _check_key, apply_options
from mmslak.apis.run_length import set_iterations
from mmslak.cli import config_checks
from mmslak.cli.config_checks import (
    TREES,
    check_datasets,
    check_pretrained,
    check_replaced_backbone,
    check_schedules,
    empty_dataset,
)
from mmslak.datasets.catalog import DATASETS
from mmslak.errors import UserError
from tests.golden import ROOT

# name for `mmslak prepare-data`: a config that needs the data, the key that moves them.
NEEDED_BY = {
    'ade20k': ('upernet_slak_t_ade20k', 'data_root'),
    'voc2007': ('faster_rcnn_slak_t_voc07', 'data_root'),
    'coco': ('cascade_mask_rcnn_slak_t_coco', 'data_root'),
    'imagenet': ('slak_t_imagenet', 'train_dataloader.dataset.data_root'),
}


def complaint(cfg: Config) -> str:
    with pytest.raises(UserError) as caught:
        check_datasets(cfg, ['train_dataloader'])
    return str(caught.value)


@pytest.mark.parametrize('name', NEEDED_BY)
def test_missing_data_name_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, key = NEEDED_BY[name]
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    said = 'says how to get it' if name == 'imagenet' else '--download; '
    assert f'mmslak prepare-data {name} {said}' in complaint(cfg)

    apply_options(cfg, {key: '/elsewhere'})
    assert f'mmslak prepare-data {name} --root /elsewhere {said}' in complaint(cfg)


def test_of_two_years_the_missing_one_is_named(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/faster_rcnn_slak_t_voc0712.py')
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (tmp_path / 'VOC2007' / part).mkdir(parents=True)
        (tmp_path / 'VOC2007' / part / 'trainval.txt').touch()
    apply_options(cfg, dict(data_root=str(tmp_path)))
    assert f'mmslak prepare-data voc2012 --root {tmp_path} --download' in complaint(cfg)


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
    with pytest.raises(UserError, match=r'--cfg-options model\.backbone\.init_cfg=None$'):
        check_pretrained(cfg)


def test_the_table_of_trees_names_what_there_is():
    names = {name for folders, _ in TREES.values() for name in folders.values()}
    assert names == set(DATASETS)


# ---------------------------------------------------------------- classes, suffixes, empty sets


def counted(head: int, scope: str, **dataset: object) -> Config:
    part = dict(num_classes=head)
    model = dict(mmdet=dict(roi_head=dict(bbox_head=part)), mmpretrain=dict(head=part))
    loader = dict(dataset=dict(type='Own', pipeline=[], **dataset))
    default = dict(decode_head=part)
    return Config(
        dict(default_scope=scope, model=model.get(scope, default), train_dataloader=loader)
    )


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', 'mmpretrain'])
def test_outputs_to_spare_stop_nothing_where_metrics_bear_them(scope, monkeypatch):
    told, three = [], dict(classes=('a', 'b', 'c'))
    monkeypatch.setattr(config_checks, 'warn', told.append)
    check_datasets(counted(3, scope, metainfo=three), ['train_dataloader'])
    assert told == []
    more = counted(4, scope, metainfo=three)
    if scope == 'mmdet':
        assert 'num_classes is 4, but Own has 3 classes' in complaint(more)
    else:
        check_datasets(more, ['train_dataloader'])
        (warning,) = told
        assert 'num_classes is 4, but Own has 3 classes: the others will not be trained' in warning
    assert 'wrong number of classes' in complaint(counted(2, scope, metainfo=three))


def test_classes_without_a_comma(tmp_path):
    said = complaint(counted(1, 'mmdet', metainfo=dict(classes='balloon')))
    assert said == (
        "classes of Own is the text 'balloon', whose letters would be the classes: write "
        "('balloon',), with the comma"
    )
    names = tmp_path / 'names.txt'  # a file of names is MMEngine's
    names.write_text('balloon\n')
    check_datasets(counted(1, 'mmdet', metainfo=dict(classes=str(names))), ['train_dataloader'])


def test_an_empty_dataset_is_told_of_and_other_errors_are_not(tmp_path):
    from mmengine.dataset import BaseDataset

    class Nothing(BaseDataset):
        METAINFO = dict(classes=('a', 'b', 'c', 'd'))

        def load_data_list(self) -> list:
            return []

    with pytest.raises(ValueError, match='need at least one array') as caught:
        Nothing(ann_file=str(tmp_path / 'list.txt'))
    assert empty_dataset(caught.value) == (
        f"Nothing finds no sample in {tmp_path}/list.txt: no annotation is of its 4 classes ('a', "
        "'b', 'c' and 1 more), or none passes its filter_cfg; for classes of your own set "
        "metainfo=dict(classes=('…',)) of the dataset"
    )
    with pytest.raises(ValueError, match='invalid literal') as caught:
        int('x')
    assert empty_dataset(caught.value) is None


# ---------------------------------------------------------------- checks that fail themselves


@pytest.mark.parametrize(('module', 'part'), [
    (config_checks, 'resolve'), (config_checks, 'walk'), (config_checks, '_class_count'),
    (config_checks, '_folders'), (config_checks, '_variable'), (options, 'resolve'),
    (options, 'accepted_arguments'), (options, '_known_keys'),
])  # fmt: skip
@pytest.mark.parametrize('fault', [ZeroDivisionError('a fault'), None])
def test_a_fault_inside_of_a_check_stops_nothing(module, part, fault, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        if fault is not None:
            raise fault
        return 5

    told = []
    cfg = Config.fromfile(ROOT / 'configs/upernet_slak_t_ade20k.py')
    for folder in ('images/training', 'annotations/training'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'x.jpg').touch()
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    for place in (config_checks, errors):
        monkeypatch.setattr(place, 'warn', told.append)
    monkeypatch.setattr(module, part, broken)
    check_datasets(cfg, ['train_dataloader'])
    check_replaced_backbone(cfg)
    check_scope(cfg)
    cfg.model.backbone.init_cfg = None
    check_pretrained(cfg)
    if part == '_known_keys':
        _check_key(cfg, 'model.backbone.with_cp')
        assert any('check_key was left out, since it ended with' in line for line in told)


def test_a_schedule_that_ends_before_it_begins():
    cfg = Config.fromfile('mmslak::upernet_slak_t_ade20k')
    check_schedules(cfg)
    warm_up, decay = cfg.param_scheduler
    warm_up.end, decay.end = 20, 20  # of a short run, whose decay begins at 1500
    with pytest.raises(
        UserError, match=r'^param_scheduler.1 \(PolyLR\) begins at 1500 and ends at 20'
    ):
        check_schedules(cfg)
    set_iterations(cfg, 20)  # as the message says
    check_schedules(cfg)
    cfg.param_scheduler = dict(type='ConstantLR', factor=1.0)
    check_schedules(cfg)
    cfg.param_scheduler = None
    check_schedules(cfg)


@pytest.mark.parametrize('length', ['max_iters', 'max_epochs'])
def test_a_variable_that_is_the_length_of_the_run(length):
    cfg = Config(dict(steps=100, sides=[3], train_cfg={length: 100}, model=dict(in_channels=[3])))
    with pytest.raises(
        UserError, match=rf'train_cfg\.{length}; for a short run .* --iterations 20$'
    ):
        apply_options(cfg, dict(steps=20))
    with pytest.raises(UserError, match=r'set where it went: model\.in_channels$'):
        apply_options(cfg, dict(sides=[4]))


# ---------------------------------------------------------------- masks


def masks(pipeline: list[dict], **model: object) -> Config:
    loader = dict(dataset=dict(type='Own', pipeline=pipeline))
    return Config(dict(default_scope='mmdet', model=model, train_dataloader=loader))


BOXES = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]


@pytest.mark.parametrize('part', ['roi_head', None])
@pytest.mark.parametrize('scope', ['', 'mmdet.'])
@pytest.mark.parametrize('count', [None, 3])
def test_a_mask_head_wants_masks_to_be_loaded(part, scope, count):
    head = dict(mask_head=[dict(type='Own')] * count if count else dict(type='Own'))
    model = {part: head} if part else head
    pipeline = [BOXES[0], dict(BOXES[1], type=f'{scope}LoadAnnotations')]
    said = complaint(masks(pipeline, **model))
    place = f'model.{part}' if part else 'model'
    assert said.startswith(f'{place}.mask_head learns masks, which LoadAnnotations of ')
    (option,) = re.findall(r'--cfg-options (\S+)=True', said)
    cfg = masks(pipeline, **model)
    apply_options(cfg, {option: True})  # as it says
    check_datasets(cfg, ['train_dataloader'])


@pytest.mark.parametrize(
    ('pipeline', 'model'),
    [
        ([BOXES[0], dict(BOXES[1], with_mask=True)], {}),  # loaded in vain
        (BOXES, dict(roi_head=dict(mask_head=None))),
        ([dict(type='LoadPanopticAnnotations')], dict(mask_head=dict(type='Own'))),
        ([dict(type='LoadOwn')], dict(mask_head=dict(type='Own'))),
        (BOXES, dict(mask_head=dict(type='mmdet.BoxInstMaskHead'))),
    ],
)
def test_masks_that_nobody_misses(pipeline, model):
    check_datasets(masks(pipeline, **model), ['train_dataloader'])


def test_validation_reads_masks_from_its_file():
    cfg = masks(BOXES, roi_head=dict(mask_head=dict(type='Own')))
    cfg.val_dataloader = cfg.pop('train_dataloader')
    check_datasets(cfg, ['val_dataloader'])
