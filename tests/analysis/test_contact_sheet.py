"""Contact sheets of pictures of one colour."""

import numpy as np
import pytest
from PIL import Image

from mmslak.analysis.contact_sheet import GAP, LARGE, LINE, SMALL, WIDTH, contact_sheet

RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of one colour."""

    def picture(size: tuple[int, int], colour: tuple[int, int, int] = RED) -> tuple[str, object]:
        path = tmp_path / f'{size}_{colour}.png'
        Image.new('RGB', size, colour).save(path)
        return f'{size} 名前', path

    return picture


def test_pictures_stand_below_their_headings(picture):
    sheet = contact_sheet({'train': [picture((480, 240)), picture((60, 60), BLUE)], 'val': []})
    pixels = np.asarray(sheet)
    assert pixels.shape[1] == 2 * (LARGE + GAP) + GAP
    top = GAP + 2 * LINE
    assert (pixels[top : top + LARGE // 2, GAP : GAP + LARGE] == RED).all()  # made smaller
    left = 2 * GAP + LARGE
    assert (pixels[top : top + LARGE, left : left + LARGE] == BLUE).all()  # made larger
    name = pixels[top + LARGE // 2 : top + LARGE // 2 + LINE, GAP : GAP + LARGE]
    assert (name == 255).all(-1).mean() > 0.5 > (name == 255).all(-1).mean() - 0.49


def test_rows_are_wrapped_and_many_pictures_are_smaller(picture):
    few, many = [picture((8, 8))] * 9, [picture((8, 8))] * 100
    sheet = contact_sheet({'train': few})
    assert sheet.width == 8 * (LARGE + GAP) + GAP <= WIDTH
    assert sheet.height == GAP + 2 * LINE + 2 * (LARGE + LINE + GAP) + GAP
    sheet = contact_sheet({'train': many})
    assert sheet.width <= WIDTH
    assert sheet.height == GAP + 2 * LINE + 7 * (SMALL + LINE + GAP) + GAP


def test_the_legend_is_at_the_bottom(picture):
    legend = {'road': BLUE, 'a name that is far too long for its place in the sheet': (0, 90, 0)}
    plain = contact_sheet({'train': [picture((8, 8))]})
    pixels = np.asarray(contact_sheet({'train': [picture((8, 8))]}, legend))
    assert pixels.shape[0] == plain.height + LINE
    below = pixels[plain.height - GAP :]
    assert (below == BLUE).all(-1).sum() == (below == (0, 90, 0)).all(-1).sum() == 11 * 11
