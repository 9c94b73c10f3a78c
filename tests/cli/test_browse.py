"""`mmslak browse` on miniatures of the data of all three libraries."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmslak.cli import browse
from mmslak.cli.browse import picture_of
from mmslak.errors import UserError
from tests import miniatures

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
    assert browse.main([*argv, '--cfg-options', f'{key}={root}']) == 0
    files = sorted(out.iterdir())
    assert len(files) == 2
    assert files[0].name.startswith('000000_')
    for file in files:
        assert cv2.imread(str(file)).std() > 10  # noise, with labels on it
    assert capsys.readouterr().out.splitlines()[-1].endswith(f' samples: {out}')


def test_labels_are_drawn(tmp_path):
    """The same pictures without any label look different."""
    root = miniatures.write_ade20k(tmp_path / 'data', size=(64, 80), val=1)
    argv = ['mmslak::upernet_slak_t_ade20k', '--split', 'val', '--cfg-options', f'data_root={root}']
    for name in ('labelled', 'bare'):
        assert browse.main([argv[0], '--out', str(tmp_path / name), *argv[1:]]) == 0
        for file in (root / 'annotations/validation').iterdir():
            cv2.imwrite(str(file), np.zeros((64, 80), np.uint8))  # no class
    pictures = [cv2.imread(str(next((tmp_path / n).iterdir()))) for n in ('labelled', 'bare')]
    assert pictures[0].shape == pictures[1].shape == (64, 80, 3)  # that of the label map
    assert (pictures[0] != pictures[1]).any(-1).mean() > 0.2


def test_boxes_of_validation_lie_on_the_picture_of_their_size(tmp_path):
    pytest.importorskip('mmcv._ext')
    root = miniatures.write_coco(tmp_path / 'data', size=(64, 80))
    argv = ['mmslak::cascade_mask_rcnn_slak_t_coco', '--split', 'val', '--out', str(tmp_path / 'o')]
    assert browse.main([*argv, '--cfg-options', f'data_root={root}/']) == 0
    shapes = {cv2.imread(str(file)).shape for file in (tmp_path / 'o').iterdir()}
    assert shapes == {(64, 80, 3)}


def test_colours_are_those_of_the_file():
    blue = torch.zeros(3, 4, 6, dtype=torch.uint8)
    blue[0] = 200  # B of BGR
    assert picture_of(blue).tolist() == [[[0, 0, 200]] * 6] * 4
    assert picture_of(torch.full((1, 2, 2), 300.0)).tolist() == [[[255] * 3] * 2] * 2
    with pytest.raises(UserError, match=r'the pipeline yields \(7, 4, 4\): expected pictures of'):
        picture_of(torch.zeros(7, 4, 4))
    with pytest.raises(UserError, match='the pipeline yields list'):
        picture_of([blue, blue])


def wrong(argv: list[str], capsys) -> str:
    assert browse.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_wrong_input_costs_one_line(tmp_path: Path, capsys):
    config = 'mmslak::upernet_slak_t_ade20k'
    assert 'dataset folder' in wrong([config, '--cfg-options', f'data_root={tmp_path}/no'], capsys)
    assert 'did you mean' in wrong(['mmslak::upernet_slak_t_ade20'], capsys)
    assert 'no visualizer' in wrong([config, '--cfg-options', 'visualizer=None'], capsys)
    with pytest.raises(SystemExit) as stop:
        browse.main([config, '--count', '0'])
    assert stop.value.code == 2
