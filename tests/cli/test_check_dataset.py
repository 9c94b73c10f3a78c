"""`mmslak check-dataset`."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from PIL import Image

from mmslak.analysis.page import POLICY
from mmslak.analysis.thumbnails import BOX
from mmslak.cli import check_dataset
from mmslak.cli.dataset_report import Checked, to_page
from mmslak.datasets.census_table import Census
from tests import miniatures
from tests.cli.test_demo_page import Links
from tests.datasets.test_samples import Dataset, save
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


def test_shared_pictures_of_data_that_the_census_does_not_know(dataset, tmp_path, capsys):
    config = Path(dataset())
    config.write_text(config.read_text() + 'val_dataloader = train_dataloader\n')
    assert check_dataset.main([str(config), '--workers', '1']) == 0
    said = f'1 of 1 picture is in train_dataloader, too, such as {tmp_path}/x.png: scores'
    assert f'warning: val_dataloader: {said}' in capsys.readouterr().out


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


# ---------------------------------------------------------------- census, JSON and page

SEGMENTATION = """
default_scope = 'mmseg'
model = dict(type='mmslak.SLaK')
data = dict(type='BaseSegDataset', data_root={root!r}, img_suffix='.JPG', seg_map_suffix='.png',
    metainfo=dict(classes=('ground', 'a <b> & c'), palette=[[0, 0, 0], [9, 9, 9]]),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
train_dataloader = dict(
    dataset=dict(data, data_prefix=dict(img_path='img/train', seg_map_path='ann/train')))
val_dataloader = dict(
    dataset=dict(data, data_prefix=dict(img_path='img/val', seg_map_path='ann/val')))
"""


@pytest.fixture
def masks(tmp_path, monkeypatch) -> str:
    """A config of two splits that share a picture, with masks of 0 and 255 in several sizes."""
    monkeypatch.setenv('MMSLAK_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('img', 'ann'):
            (tmp_path / f'data/{kind}/{split}').mkdir(parents=True)
        for i, (height, width) in enumerate([(20, 30), (44, 28)]):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f'data/img/{split}/{i}.JPG')
            values = np.zeros((height, width), np.uint8)
            values[5:9] = 255
            Image.fromarray(values).save(tmp_path / f'data/ann/{split}/{i}.png')
    shared = (tmp_path / 'data/img/train/0.JPG').read_bytes()
    (tmp_path / 'data/img/val/0.JPG').write_bytes(shared)
    (tmp_path / 'config.py').write_text(SEGMENTATION.format(root=str(tmp_path / 'data')))
    return str(tmp_path / 'config.py')


def test_the_census_its_findings_and_shared_pictures_are_said(masks, tmp_path, capsys):
    assert check_dataset.main([masks, '--workers', '1']) == 0
    out = capsys.readouterr().out
    assert "warning: train_dataloader: class 'a <b> & c' never occurs, and 255" in out
    assert f'{tmp_path}/data/ann/train_indices --map 255:1' in out
    val = tmp_path / 'data/img/val/0.JPG'
    shared = f'1 of 2 pictures is in train_dataloader, too, such as {val}, which is {tmp_path}'
    assert f'warning: val_dataloader: {shared}' in out
    assert out.index('never occurs') < out.index('train_dataloader: 2 samples, 0 bad')
    assert 'For each bad sample' not in out


def test_json_has_all_that_is_printed(masks, tmp_path, capsys):
    (tmp_path / 'data/ann/val/1.png').write_bytes(b'')
    file = tmp_path / 'new/all.json'
    assert check_dataset.main([masks, '--workers', '1', '--json', str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        'For each bad sample: repair it or take it out (where new-config wrote the config, then '
        'type: mmslak new-config … --force)'
    )
    found = json.loads(file.read_text())
    assert found['config'] == masks
    train, val = found['loaders']['train_dataloader'], found['loaders']['val_dataloader']
    assert (train['samples'], train['bad'], train['census']['pictures']) == (2, [], 2)
    assert train['census']['table'][1] == dict(name='a <b> & c', pictures=0, amount=0)
    assert val['bad'][0] == dict(file=f'{tmp_path}/data/ann/val/1.png', reason='the file is empty')
    kinds = [finding['kind'] for finding in val['census']['findings']]
    assert 'shared-pictures' in kinds


def test_the_page_is_whole_and_has_thumbnails(masks, tmp_path):
    (tmp_path / 'data/ann/val/1.png').write_bytes(b'')
    page = tmp_path / 'new/page.html'
    assert check_dataset.main([masks, '--workers', '1', '--page', str(page)]) == 1
    text, links = page.read_text(), Links(page)
    assert POLICY in text
    assert all(address.startswith('data:image/jpeg;base64,') for address in links.addresses)
    assert '<b>' not in text
    assert "class 'a <b> & c' never occurs" in links.text
    assert '1 of 2 samples cannot be trained on: the file is empty' in links.text
    # Of the shared picture: it and its label map; of the empty label map: its picture alone.
    section = text[text.index('1 of 2 pictures is in train_dataloader') :]
    assert section[: section.index('</section>')].count('<img') == 2
    section = text[text.index('1 of 2 samples cannot be trained on') :]
    assert section[: section.index('</section>')].count('<img') == 1


def test_samples_are_shown_of_clean_data(masks, tmp_path):
    page = tmp_path / 'page.html'
    for file in (tmp_path / 'data/ann').rglob('*.png'):
        Image.fromarray(np.asarray(Image.open(file)) // 255).save(file)
    argv = [masks, '--split', 'train', '--workers', '1', '--page', str(page)]
    assert check_dataset.main(argv) == 0
    text = page.read_text()
    assert 'Nothing was found.' in text
    assert text.count('<img') == 4  # two pictures with their label maps
    assert text.count(f'<figcaption>{tmp_path}/data/img/train/1.JPG</figcaption>') == 2


def test_of_many_samples_few_are_asked_for(tmp_path):
    asked = []

    def get_data_info(index: int) -> dict:
        asked.append(index)
        return dict(img_path=f'{tmp_path}/{index}.jpg', gt_label=1)

    save(tmp_path / '0.jpg')
    classes = dict(classes=('dog', 'cat'))
    dataset = Dataset(pipeline=(), metainfo=classes, get_data_info=get_data_info, length=1001)
    part = Checked('train_dataloader', Census('train_dataloader'), dataset, 1001)
    part.odd['grey'], part.places[f'{tmp_path}/7.jpg'] = [f'{tmp_path}/7.jpg'], 7
    text = to_page('my.py', [part])
    assert asked == [7, 0, 200, 400, 600, 800, 1000]
    assert f'<figcaption>cat: {tmp_path}/0.jpg</figcaption>' in text


def test_boxes_are_drawn_on_the_page(tmp_path, monkeypatch):
    pytest.importorskip('mmcv._ext')
    monkeypatch.setenv('MMSLAK_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    root = miniatures.write_coco(tmp_path / 'data', train=2, val=2)
    (root / 'train2017/000000000001.jpg').unlink()
    page = tmp_path / 'page.html'
    argv = ['mmslak::cascade_mask_rcnn_slak_t_coco', '--page', str(page), '--workers', '1']
    assert check_dataset.main([*argv, '--cfg-options', f'data_root={root}/']) == 1
    address = Links(page).addresses[-1].partition(',')[2]  # of an odd picture: one with boxes
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address)))).astype(int)
    assert (np.abs(pixels - BOX).sum(-1) < 60).sum() > 50


def test_data_that_cannot_be_built_are_explained_and_the_others_are_read(masks, tmp_path, capsys):
    argv = [masks, '--cfg-options', 'train_dataloader.dataset.img_suffix=.png']
    assert check_dataset.main([*argv, '--page', str(tmp_path / 'page.html')]) == 1
    out = capsys.readouterr().out
    assert f"error: train_dataloader: no picture in {tmp_path}/data/img/train ends in '.png'" in out
    assert 'val_dataloader: 2 samples, 0 bad' in out
    assert 'no picture in' in Links(tmp_path / 'page.html').text
