"""`mmslak prepare-data labels` on folders of small label maps."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmslak.cli.prepare_data import main
from tests.datasets.test_label_maps import save


def labels(*argv: object) -> int:
    return main(['labels', *map(str, argv)])


def read(path: Path) -> list:
    picture = Image.open(path)
    assert (picture.format, picture.mode) == ('PNG', 'L')
    return np.asarray(picture).tolist()


def error(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def masks(tmp_path):
    """Two masks of 0 and 255, in folders."""
    source = tmp_path / 'my masks'
    (source / 'train').mkdir(parents=True)
    save(source / 'train/a.bmp', [[0, 0, 255, 255]])
    save(source / 'b.PNG', [[0, 0, 0, 0]])
    return source


@pytest.fixture
def coloured(tmp_path):
    """Two coloured label maps, and one of black alone that has one channel."""
    source = tmp_path / 'colours'
    source.mkdir()
    save(source / 'a.png', [[[0, 0, 0], [128, 0, 0], [128, 0, 0]]])
    save(source / 'b.png', [[[0, 0, 0], [128, 0, 0], [0, 128, 0]]])
    save(source / 'c.png', [[0, 0, 0]])
    return source


def test_values_are_listed_with_the_command(masks, capsys):
    assert labels(masks) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f'{masks}: 2 label maps with one value per pixel',
        '    value    pixels  label maps',
        '        0    75.00%  2',
        '      255    25.00%  1',
        'This makes indices of them; set the numbers to those of your classes, from 0:',
        f"    mmslak prepare-data labels '{masks}' '{masks}_indices' --map 255:1",
    ]
    assert sorted(path.name for path in masks.parent.iterdir()) == ['my masks']


def test_the_folder_where_one_is_gets_a_neighbour(masks, monkeypatch, capsys):
    monkeypatch.chdir(masks)
    assert labels('.') == 0
    assert f". '{masks}_indices' --map 255:1" in capsys.readouterr().out


def test_the_command_that_is_listed_works(masks, capsys):
    before = (masks / 'train/a.bmp').read_bytes()
    assert labels(masks) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:2] == ['mmslak', 'prepare-data']
    assert main(words[2:]) == 0
    out = Path(f'{masks}_indices')
    assert capsys.readouterr().out.splitlines() == [
        f'2 label maps: {out}',
        '    index    pixels  label maps',
        '        0    75.00%  2',
        '        1    25.00%  1',
        f'next:    mmslak new-config {masks.parent} --out my.py',
    ]
    assert read(out / 'train/a.png') == [[0, 0, 1, 1]]
    assert read(out / 'b.png') == [[0, 0, 0, 0]]
    assert (masks / 'train/a.bmp').read_bytes() == before
    assert labels(out) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        'They are indices already: nothing is to be mapped.',
        f'next:    mmslak new-config {masks.parent} --out my.py',
    ]


def test_colours_are_listed_and_mapped(coloured, tmp_path, capsys):
    assert labels(coloured) == 0
    out = capsys.readouterr().out
    assert '  #000000    55.56%  3\n  #800000    33.33%  2\n  #008000    11.11%  1\n' in out
    assert out.endswith("--map '#000000:0' '#800000:1' '#008000:2'\n")
    target = tmp_path / 'new/indices'
    pairs = ['#000000:0', '128,0,0:1', '#008000:2']
    assert labels(coloured, target, '--map', *pairs) == 0
    assert [read(target / f'{name}.png') for name in 'abc'] == [
        [[0, 1, 1]],
        [[0, 1, 2]],
        [[0, 0, 0]],
    ]


def test_a_colour_without_an_index_is_named_and_nothing_is_written(coloured, tmp_path, capsys):
    target = tmp_path / 'indices'
    assert labels(coloured, target, '--map', '#000000:0', '#800000:1') == 2
    assert error(capsys) == (
        f'error: {coloured}/b.png: colour #008000 (1 pixels) is not in --map, in 1 of 3 label '
        "maps; add '#008000:INDEX', or --unknown 255 for all of them (ignored in training), or "
        '--nearest if they are blurred'
    )
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1  # no leftover
    argv = [coloured, target, '--map', '#000000:0', '#800000:1', '--unknown', 255]
    assert labels(*argv) == 0
    assert read(target / 'b.png') == [[0, 1, 255]]


def test_blurred_masks_get_the_nearest(tmp_path, capsys):
    source, target = tmp_path / 'masks', tmp_path / 'indices'
    source.mkdir()
    pixels = np.zeros((64, 64), np.uint8)
    pixels[13:50, 21:44] = 255
    save(source / 'a.JPEG', pixels, quality=60)
    assert labels(source) == 0
    out = capsys.readouterr().out
    assert 'have blurred them: --nearest undoes that' in out
    assert out.endswith('--map 0:0 255:1 --nearest\n')
    assert labels(source, target, '--map', '0:0', '255:1', '--nearest') == 0
    assert read(target / 'a.png') == (pixels // 255).tolist()


def test_a_value_that_was_there_before_is_noted(tmp_path, capsys):
    (tmp_path / 'masks').mkdir()
    save(tmp_path / 'masks/a.png', [[0, 1, 255]])
    assert labels(tmp_path / 'masks', tmp_path / 'out', '--map', '255:1') == 0
    note = capsys.readouterr().out.splitlines()[-2]
    assert note == 'note: 1 was there before, and 255 became 1, too'


def test_wrong_folders_cost_one_line(masks, tmp_path, capsys):
    assert labels(tmp_path / 'no') == 2
    assert error(capsys) == f'error: {tmp_path}/no: no such folder'
    (tmp_path / 'empty').mkdir()
    assert labels(tmp_path / 'empty') == 2
    assert 'no label map in it or below; expected .png .jpg' in error(capsys)
    for target in (masks, masks / 'train', masks / 'new', f'{masks}/../my masks'):
        assert labels(masks, target, '--map', '255:1') == 2
        assert 'is SRC or lies in it: give another folder' in error(capsys)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/x').touch()
    assert labels(masks, tmp_path / 'full', '--map', '255:1') == 2
    assert error(capsys) == f'error: {tmp_path}/full is there already: give a new folder'
    (masks / 'b.tif').write_bytes((masks / 'b.PNG').read_bytes())
    assert labels(masks, tmp_path / 'empty', '--map', '255:1') == 2
    assert 'several pictures would become b.png' in error(capsys)


def test_wrong_options_are_explained(masks, tmp_path, capsys):
    for argv in ([masks, tmp_path / 'out'], [masks, '--map', '255:1']):
        assert labels(*argv) == 2
        assert 'DST and --map go together' in error(capsys)
    assert labels(masks, tmp_path / 'out', '--map', '255:300') == 2
    assert 'an index is at most 255' in error(capsys)
    with pytest.raises(SystemExit) as stop:
        labels(masks, '--unknown', '256')
    assert stop.value.code == 2
    assert "expected an index from 0 to 255, got '256'" in capsys.readouterr().err
