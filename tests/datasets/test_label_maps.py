"""Label maps as people have them, and the indices that are made of them."""

from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from mmslak.datasets.label_maps import (
    LabelMapError,
    UnmappedError,
    count_values,
    find_label_maps,
    is_blurred,
    parse_mapping,
    read_values,
    suggest_mapping,
    to_indices,
)
from mmslak.errors import UserError

RED, GREEN = 0x800000, 0x008000


def save(path, pixels, mode=None, **options):
    """Writes a picture of nested lists or an array."""
    picture = Image.fromarray(np.asarray(pixels, np.uint8))
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


# ---------------------------------------------------------------- what there is


def test_pictures_at_any_depth_and_of_any_case_are_found(tmp_path):
    for name in ('b.PNG', 'a/c.tif', 'a/d.JPG', 'notes.txt', '.hidden.png'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_label_maps(tmp_path)]
    assert found == ['a/c.tif', 'a/d.JPG', 'b.PNG']


def test_a_palette_holds_indices_and_has_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(tmp_path / 'p.png')
    values, colours = read_values(tmp_path / 'p.png')
    assert (values.tolist(), colours) == ([[0, 1, 1]], False)
    assert read_values(tmp_path / 'p.png', colours=True)[0].tolist() == [[0, RED, RED]]


def test_depths_are_read_as_they_are(tmp_path):
    deep = np.array([[0, 300, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    assert read_values(tmp_path / 'deep.png')[0].tolist() == [[0, 300, 65535]]
    with pytest.raises(LabelMapError, match=r'deep.png: one channel of more than 8 bits'):
        read_values(tmp_path / 'deep.png', colours=True)
    Image.fromarray(np.array([[False, True]])).save(tmp_path / 'one_bit.png')
    assert read_values(tmp_path / 'one_bit.png')[0].tolist() == [[0, 1]]
    save(tmp_path / 'alpha.png', [[3, 7]], 'LA')
    assert read_values(tmp_path / 'alpha.png')[0].tolist() == [[3, 7]]
    Image.fromarray(np.array([[0.0, 2.0]], np.float32)).save(tmp_path / 'float.tif')
    assert read_values(tmp_path / 'float.tif')[0].tolist() == [[0, 2]]
    Image.fromarray(np.array([[0.0, 2.5]], np.float32)).save(tmp_path / 'half.tif')
    with pytest.raises(LabelMapError, match=r'half.tif: values with fractions, such as 2.5'):
        read_values(tmp_path / 'half.tif')


def test_colours_and_grey_in_three_channels(tmp_path):
    save(tmp_path / 'grey.png', [[[0, 0, 0], [7, 7, 7]]])
    assert read_values(tmp_path / 'grey.png')[0].tolist() == [[0, 7]]
    assert read_values(tmp_path / 'grey.png', colours=True)[0].tolist() == [[0, 0x070707]]
    save(tmp_path / 'colour.png', [[[0, 0, 0], [128, 0, 0], [1, 2, 3]]])
    values, colours = read_values(tmp_path / 'colour.png')
    assert (values.tolist(), colours) == ([[0, RED, 0x010203]], True)
    with pytest.raises(LabelMapError, match=r'colour.png: in colour \(#000000, #800000, #010203'):
        read_values(tmp_path / 'colour.png', colours=False)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / 'x.png').write_text('text')
    with pytest.raises(LabelMapError, match=r'x.png: cannot be read as a picture'):
        read_values(tmp_path / 'x.png')


def test_values_are_counted(tmp_path):
    save(tmp_path / 'a.png', [[0, 0, 255]])
    assert count_values(tmp_path / 'a.png') == (Counter({0: 2, 255: 1}), False)
    noise = [[[i % 256, i // 256, 9] for i in range(300)]]
    counts, colours = count_values(save(tmp_path / 'noise.png', noise))
    assert colours
    assert (len(counts), counts[None], counts.total()) == (257, 44, 300)
    assert is_blurred(tmp_path / 'noise.png', counts)
    assert not is_blurred(tmp_path / 'a.png', Counter(range(30)))  # classes of one picture
    assert is_blurred(tmp_path / 'a.JPG', Counter(range(30)))


@pytest.mark.parametrize(
    ('counts', 'colours', 'mapping'),
    [
        ({0: 9, 255: 1}, False, {255: 1}),
        ({0: 9, 1: 3, 255: 1}, False, {}),
        ({0: 9, 1: 3, 4: 2}, False, {}),  # classes 2 and 3 do not occur
        ({0: 9, 85: 3, 170: 2, 255: 1}, False, {85: 1, 170: 2}),
        ({1: 9, 2: 2}, False, {}),
        ({RED: 9, 0: 3, GREEN: 1}, True, {0: 0, RED: 1, GREEN: 2}),
        ({RED: 2, GREEN: 3}, True, {GREEN: 0, RED: 1}),
    ],
)
def test_a_mapping_is_suggested(counts, colours, mapping):
    assert suggest_mapping(Counter(counts), colours) == mapping


def test_of_blurred_values_the_frequent_ones_are_mapped():
    counts = Counter({0: 500, 255: 480, 3: 9, 250: 8, None: 3})
    assert suggest_mapping(counts, False, blurred=True) == {0: 0, 255: 1}
    assert suggest_mapping(Counter({0: 990, 0xFE0000: 6, 7: 4}), True, True) == {0: 0, 0xFE0000: 1}


# ---------------------------------------------------------------- mapping


def test_a_mapping_as_it_is_typed():
    assert parse_mapping(['255:1', '0:0']) == ({255: 1, 0: 0}, False)
    assert parse_mapping(['#800000:1', '0,128,0:2', '(1, 2, 3):255']) == (
        {RED: 1, GREEN: 2, 0x010203: 255},
        True,
    )


@pytest.mark.parametrize(
    'pair', ['255', '255=1', '255:256', 'red:1', '#80000:1', '0,0,256:1', ':1']
)
def test_a_malformed_pair_is_named(pair):
    with pytest.raises(UserError, match=f'--map {pair}: expected VALUE:INDEX such as 255:1'):
        parse_mapping([pair])


def test_a_key_has_one_index_and_keys_are_of_one_kind():
    assert parse_mapping(['5:1', '5:1']) == ({5: 1}, False)
    with pytest.raises(UserError, match='--map 5:2: 5 is also mapped to 1'):
        parse_mapping(['5:1', '5:2'])
    with pytest.raises(UserError, match='--map has values and colours'):
        parse_mapping(['0:0', '#800000:1'])


def test_values_that_are_not_mapped_stay():
    values = np.array([[0, 255], [1, 7]])
    indices = to_indices(values, {255: 1}, False)
    assert indices.dtype == np.uint8
    assert indices.tolist() == [[0, 1], [1, 7]]
    assert to_indices(values, {255: 1, 1: 0}, False, unknown=9).tolist() == [[9, 1], [0, 9]]


def test_values_that_need_more_than_8_bits_are_refused_unless_mapped():
    values = np.array([[0, 300, 300, -1]])
    with pytest.raises(UnmappedError, match=r'value 300 \(2 pixels\), -1 \(1 pixels\)') as caught:
        to_indices(values, {0: 1}, False)
    assert caught.value.pixels == {300: 2, -1: 1}
    assert to_indices(values, {300: 3}, False, unknown=255).tolist() == [[255, 3, 3, 255]]


def test_colours_that_are_not_mapped_are_refused():
    values = np.array([[0, RED, GREEN, GREEN]])
    with pytest.raises(UnmappedError, match=r'colour #008000 \(2 pixels\)$'):
        to_indices(values, {0: 0, RED: 1}, True)
    assert to_indices(values, {0: 0, RED: 1}, True, unknown=255).tolist() == [[0, 1, 255, 255]]


def test_the_nearest_colour_and_value():
    near = 0x7E0402
    values = np.array([[near, GREEN - 0x0300, 0x050505, RED]])
    mapping = {0: 0, RED: 1, GREEN: 2}
    assert to_indices(values, mapping, True, nearest=True).tolist() == [[1, 2, 0, 1]]
    assert to_indices(
        np.array([[3, 126, 129, 251]]), {0: 0, 255: 1}, False, nearest=True
    ).tolist() == [[0, 0, 1, 1]]
