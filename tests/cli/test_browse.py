"""`mmslak browse` on miniatures of the data of all three libraries."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmslak.cli import browse
from mmslak.cli.browse import picture_of
from mmslak.errors import UserError
from tests import miniatures
from tests.cli.test_demo_page import check_addresses

CASES = {
    'mmseg': ('upernet_slak_t_ade20k', miniatures.write_ade20k, 'data_root'),
    'mmdet': ('cascade_mask_rcnn_slak_t_coco', miniatures.write_coco, 'data_root'),
    'mmpretrain': (
        'slak_t_imagenet',
        miniatures.write_imagenet,
        'train_dataloader.dataset.data_root',
    ),
}


@pytest.mark.parametrize('library', CASES)
def test_pictures_with_their_labels(library, tmp_path, capsys):
    config, write, key = CASES[library]
    if library == 'mmdet':
        pytest.importorskip('mmcv._ext')
    root, out = write(tmp_path / 'data'), tmp_path / 'out'
    argv = [f'mmslak::{config}', '--count', '2', '--out', str(out)]
    argv += ['--cfg-options', f'{key}={root}']
    if library == 'mmpretrain':
        argv += [f'val_dataloader.dataset.data_root={root}']
    assert browse.main(argv) == 0
    assert sorted(file.name for file in out.iterdir()) == [
        'index.html',
        'sheet.png',
        'train',
        'val',
    ]
    for split in ('train', 'val'):
        files = sorted((out / split).iterdir())
        assert len(files) == 2
        assert files[0].name.startswith('000000_')
        for file in files:
            assert cv2.imread(str(file)).std() > 10  # noise, with labels on it
    assert f' samples: {out}/train\n' in capsys.readouterr().out
    pictures = [a for a in check_addresses(out / 'index.html') if a.startswith('train/')]
    assert len(set(pictures)) == 2
    sheet = cv2.imread(str(out / 'sheet.png'))
    assert sheet.shape[1] == 2 * 248 + 8
    assert sheet[50:300, 8:248].std() > 10


def test_labels_are_drawn(tmp_path):
    """The same pictures without any label look different."""
    root = miniatures.write_ade20k(tmp_path / 'data', size=(64, 80), val=1)
    argv = ['mmslak::upernet_slak_t_ade20k', '--split', 'val', '--cfg-options', f'data_root={root}']
    for name in ('labelled', 'bare'):
        assert browse.main([argv[0], '--out', str(tmp_path / name), *argv[1:]]) == 0
        for file in (root / 'annotations/validation').iterdir():
            cv2.imwrite(str(file), np.zeros((64, 80), np.uint8))  # no class
    names = ('labelled', 'bare')
    pictures = [cv2.imread(str(next((tmp_path / n / 'val').iterdir()))) for n in names]
    assert pictures[0].shape == pictures[1].shape == (64, 80, 3)  # that of the label map
    assert (pictures[0] != pictures[1]).any(-1).mean() > 0.2


def test_boxes_of_validation_lie_on_the_picture_of_their_size(tmp_path):
    pytest.importorskip('mmcv._ext')
    root = miniatures.write_coco(tmp_path / 'data', size=(64, 80))
    argv = ['mmslak::cascade_mask_rcnn_slak_t_coco', '--split', 'val', '--out', str(tmp_path / 'o')]
    assert browse.main([*argv, '--cfg-options', f'data_root={root}/']) == 0
    shapes = {cv2.imread(str(file)).shape for file in (tmp_path / 'o/val').iterdir()}
    assert shapes == {(64, 80, 3)}


def test_colours_are_those_of_the_file():
    blue = torch.zeros(3, 4, 6, dtype=torch.uint8)
    blue[0] = 200  # B of BGR
    assert picture_of(blue).tolist() == [[[0, 0, 200]] * 6] * 4
    assert picture_of(torch.full((1, 2, 2), 300.0)).tolist() == [[[255] * 3] * 2] * 2


def test_pictures_of_other_depths_and_channels():
    seven = torch.arange(7).repeat_interleave(4).reshape(7, 2, 2).byte()
    assert picture_of(seven)[0, 0].tolist() == [2, 1, 0]  # the first three
    assert picture_of(seven[:2])[0, 0].tolist() == [0, 0, 0]
    deep = torch.tensor([[[0, 1000], [2000, 4000]]], dtype=torch.int32)
    assert picture_of(deep)[..., 0].tolist() == [[0, 63], [127, 255]]
    normalised = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]])
    assert picture_of(normalised)[..., 0].tolist() == [[0, 127], [191, 255]]
    augmented = torch.tensor([[[-3.0, 40.0], [128.0, 260.0]]])
    assert picture_of(augmented)[..., 0].tolist() == [[0, 40], [128, 255]]
    with pytest.raises(
        UserError, match=r'the pipeline yields \(1, 3, 4, 4\): expected pictures of'
    ):
        picture_of(torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match='the pipeline yields list'):
        picture_of([seven, seven])


def test_every_class_has_a_colour():
    """Visualizers stop where there are fewer colours than classes."""
    meta = browse.meta_to_draw(dict(classes=('a', 'b'), palette=[(1, 2, 3)]))
    assert len(set(meta['palette'])) == 2
    meta = browse.meta_to_draw(dict(classes=tuple('abcdefghijklmnopqrstuvwxyz')))
    assert len(set(meta['palette'])) == 26
    kept = browse.meta_to_draw(dict(classes=('a',), palette=([1, 2, 3], [4, 5, 6])))
    assert kept['palette'] == [(1, 2, 3), (4, 5, 6)]
    assert browse.meta_to_draw({}) == dict(palette=[])


def test_the_legend_has_the_classes_that_occur(tmp_path):
    root = miniatures.write_ade20k(tmp_path / 'data', size=(64, 80), val=1)
    labels = np.full((64, 80), 255, np.uint8)
    labels[:9], labels[9:20] = 1, 150
    for file in (root / 'annotations/validation').iterdir():
        cv2.imwrite(str(file), labels)
    argv = [
        'mmslak::upernet_slak_t_ade20k',
        '--split',
        'val',
        '--out',
        str(tmp_path / 'a #1 & "b"'),
    ]
    assert browse.main([*argv, '--cfg-options', f'data_root={root}']) == 0
    page = tmp_path / 'a #1 & "b"/index.html'
    assert 'rgb(120, 120, 120)"></span>wall' in page.read_text()
    assert page.read_text().count('class="colour"') == 2  # wall and flag
    check_addresses(page)


def test_a_class_on_no_picture_is_named_and_keeps_its_colour(tmp_path, capsys):
    root = miniatures.write_ade20k(tmp_path / 'data', size=(64, 80), val=1)
    labels = np.ones((64, 80), np.uint8)
    labels[20:40, 20:40] = 2
    for file in (root / 'annotations/validation').iterdir():
        cv2.imwrite(str(file), labels)
    config = tmp_path / 'my.py'
    metainfo = dict(classes=('soil', 'crop', 'weed'), palette=[[230, 25, 75], [9, 9, 9], [1, 2, 3]])
    config.write_text(
        "_base_ = ['mmslak::upernet_slak_t_ade20k.py']\n"
        "val_dataloader = dict(dataset=dict(type='BaseSegDataset', reduce_zero_label=True, "
        f'data_root={str(root)!r}, metainfo={metainfo}))\n'
        'model = dict(decode_head=dict(num_classes=3), auxiliary_head=dict(num_classes=3))\n'
    )
    assert browse.main([str(config), '--split', 'val', '--out', str(tmp_path / 'out')]) == 0
    said = capsys.readouterr().out
    assert "on none of the pictures: 'weed'; --count draws more of them\n" in said
    page = (tmp_path / 'out/index.html').read_text()
    assert page.count('class="colour"') == 3
    # The border of a region has its full colour, of which the inside has a tint alone.
    (file,) = (tmp_path / 'out/val').iterdir()
    drawn = cv2.imread(str(file))[..., ::-1]
    assert drawn[19, 30].tolist() == [230, 25, 75]
    assert drawn[39, 30].tolist() == [9, 9, 9]
    assert drawn[37, 37].tolist() != [9, 9, 9]


def test_a_broken_picture_is_left_out(tmp_path, capsys):
    root = miniatures.write_ade20k(tmp_path / 'data', size=(64, 80), val=2)
    argv = ['mmslak::upernet_slak_t_ade20k', '--split', 'val', '--out', str(tmp_path / 'out')]
    argv += ['--cfg-options', f'data_root={root}']
    first, second = sorted((root / 'images/validation').iterdir())
    first.write_bytes(b'')
    assert browse.main(argv) == 0
    assert [file.name for file in (tmp_path / 'out/val').iterdir()] == [f'000001_{second.stem}.png']
    second.write_bytes(b'')
    capsys.readouterr()
    line = wrong(argv, capsys)
    assert line.endswith('; mmslak check-dataset lists all')
    assert (
        f'2 of 2 samples are bad or cannot be drawn; the first: {first}: the file is empty' in line
    )


def wrong(argv: list[str], capsys) -> str:
    assert browse.main(argv) == 2
    (line,) = re.findall('^error: .*', capsys.readouterr().err, re.MULTILINE)
    return line


def test_wrong_input_costs_one_line(tmp_path: Path, capsys):
    config = 'mmslak::upernet_slak_t_ade20k'
    assert 'dataset folder' in wrong([config, '--cfg-options', f'data_root={tmp_path}/no'], capsys)
    assert 'did you mean' in wrong(['mmslak::upernet_slak_t_ade20'], capsys)
    assert 'no visualizer' in wrong([config, '--cfg-options', 'visualizer=None'], capsys)
    with pytest.raises(SystemExit) as stop:
        browse.main([config, '--count', '0'])
    assert stop.value.code == 2
