"""Thumbnails of pictures and label maps."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmslak.analysis.thumbnails import BOX, SIDE, thumbnail


def save(path, pixels, **options) -> str:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return str(path)


def test_boxes_are_scaled_with_the_picture(tmp_path):
    path = save(tmp_path / 'a.png', np.zeros((2 * SIDE, 4 * SIDE, 3)))
    pixels = np.asarray(thumbnail(path, [(400, 200, 600, 300)]))
    assert pixels.shape == (SIDE // 2, SIDE, 3)
    rows, columns = np.nonzero((pixels == BOX).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 75, 100, 150)


def test_boxes_that_make_no_sense_do_not_stop_it(tmp_path):
    path = save(tmp_path / 'a.png', np.zeros((40, 60, 3)))
    boxes = [(np.nan, 0, 1, 1), (50, 30, 10, 10), (-20, -20, 900, 900), (70, 70, 80, 80)]
    assert (np.asarray(thumbnail(path, boxes)) == BOX).all(-1).any()


def test_a_label_map_has_a_colour_for_each_value(tmp_path):
    values = np.repeat([[0, 1, 255, 2]], 4, 0)
    pixels = np.asarray(thumbnail(save(tmp_path / 'a.png', values)))
    assert pixels.shape == (SIDE, SIDE, 3)
    seen = [tuple(pixels[9, SIDE * i // 4 + 9]) for i in range(4)]
    assert seen[0] == (0, 0, 0)
    assert seen[2] == (255, 255, 255)
    assert len(set(seen)) == 4
    Image.fromarray(values.astype(bool)).save(tmp_path / 'bits.png')
    assert len(np.unique(np.asarray(thumbnail(str(tmp_path / 'bits.png'))), axis=1)[0]) == 2


def test_pictures_of_other_forms(tmp_path):
    grey = save(tmp_path / 'grey.jpg', np.arange(64).reshape(8, 8) * 4)
    assert thumbnail(grey).mode == 'RGB'
    deep = np.array([[0, 1000], [2000, 4000]], np.uint16)
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    assert np.asarray(thumbnail(str(tmp_path / 'deep.png')))[..., 0].tolist() == [
        [0, 63],
        [127, 255],
    ]
    turned = Image.Exif()
    turned[274] = 6
    path = save(tmp_path / 'turned.jpg', np.zeros((20, 40, 3)), exif=turned)
    assert thumbnail(path).size == (20, 40)
    (tmp_path / 'text.png').write_text('text')
    with pytest.raises(OSError, match='cannot identify'):
        thumbnail(str(tmp_path / 'text.png'))
