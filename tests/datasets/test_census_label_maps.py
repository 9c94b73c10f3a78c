"""What the census says of label maps, each with exact numbers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmslak.datasets.census import Census, Row, take_census
from mmslak.datasets.census_label_maps import SAMPLE, evenly, labels_of_values


def write(root: Path, maps: list[np.ndarray], suffix: str = '.png', picture: str = '.jpg') -> Path:
    """Pictures 0, 1, … and their label maps."""
    for i, values in enumerate(maps):
        for folder in ('img', 'ann'):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', values.shape[1::-1]).save(root / f'img/{i}{picture}')
        Image.fromarray(np.asarray(values, np.uint8)).save(root / f'ann/{i}{suffix}')
    return root


def census_of(root: Path, classes: tuple[str, ...] = ('background', 'coin'), **settings) -> Census:
    from mmseg.datasets import BaseSegDataset

    loader, full = settings.pop('loader', ''), settings.pop('full', False)
    prefix = dict(img_path=str(root / 'img'), seg_map_path=str(root / 'ann'))
    dataset = BaseSegDataset(
        metainfo=dict(classes=classes), data_prefix=prefix, lazy_init=True, **settings
    )
    return take_census(dataset, loader=loader, full=full)


def said(census: Census) -> dict[str, str]:
    return {finding.kind: finding.message for finding in census.findings}


def half(value: int, other: int = 0) -> np.ndarray:
    """(4, 6): the left half is of one value, the right half of the other."""
    return np.repeat([[value] * 3 + [other] * 3], 4, axis=0)


def test_pixels_and_pictures_are_counted(tmp_path):
    census = census_of(write(tmp_path, [half(1), half(0), half(255, 1)]), loader='val_dataloader')
    assert census.table == [Row('background', 2, 36), Row('coin', 2, 24)]
    assert (census.pictures, census.empty, census.unit) == (3, 0, 'pixels')
    assert census.ignored == pytest.approx(12 / 72)
    assert census.sizes == dict(smallest=(6, 4), largest=(6, 4))
    assert census.findings == []
    assert Census.from_dict(census.to_dict()) == census


def test_255_beside_0(tmp_path):
    census = census_of(write(tmp_path, [half(255), half(255)]))
    assert said(census) == {
        'ignored-value-like-class': "class 'coin' never occurs, and 255, which is ignored, does in "
        "2 of 2 label maps (50 % of the pixels): if 255 means 'coin', map it with mmslak "
        f'prepare-data labels {tmp_path}/ann {tmp_path}/ann_indices --map 255:1, and set '
        f"seg_map_path='{tmp_path}/ann_indices'"
    }
    assert not census.findings[0].stops
    assert census.findings[0].files == (f'{tmp_path}/ann/0.png', f'{tmp_path}/ann/1.png')


def test_reduce_zero_label_takes_a_class_away(tmp_path):
    root = write(tmp_path, [half(1), half(1)])
    (message,) = said(census_of(root, reduce_zero_label=True)).values()
    assert message == (
        "class 'coin' never occurs, and 0, which is ignored, does in 2 of 2 label maps (50 % of "
        'the pixels): set reduce_zero_label=False of the dataset and of LoadAnnotations if 0 is '
        "the class 'background'"
    )
    assert census_of(root, ('coin',), reduce_zero_label=True).findings == []


def test_classes_counted_from_1(tmp_path):
    (message,) = said(census_of(write(tmp_path, [half(1, 2), half(0, 2)]))).values()
    assert message == (
        'the value 2 in 2 of 2 label maps is no class: the 2 classes are 0 to 1, and 255 is '
        'ignored; if 0 is no class, set reduce_zero_label=True of the dataset and of '
        'LoadAnnotations'
    )


def test_grey_levels_name_their_mapping(tmp_path):
    census = census_of(write(tmp_path, [half(128)]))
    assert said(census)['label-values'].endswith(
        f'them with mmslak prepare-data labels {tmp_path}/ann {tmp_path}/ann_indices --map 128:1'
    )
    assert not any(finding.stops for finding in census.findings)


def test_labels_of_no_class_stop_training_alone(tmp_path):
    root = write(tmp_path, [half(7, 9)])
    assert [f.kind for f in census_of(root).findings if f.stops] == ['no-label']
    assert not any(f.stops for f in census_of(root, loader='val_dataloader').findings)


def test_more_than_half_ignored(tmp_path):
    root = write(tmp_path, [half(1), half(255, 255), half(255, 255)])
    assert said(census_of(root))['mostly-ignored'].startswith(
        '67 % of the pixels are ignored (255: 67 %): if that is a class, such as the background, '
    )


def test_a_class_that_never_occurs(tmp_path):
    census = census_of(write(tmp_path, [half(1)] * 6), ('background', 'a', 'c'))
    assert said(census) == {
        'class-never-occurs': "class 'c' never occurs in 6 pictures: nothing is learnt of it; "
        'label some, or take it out of the classes'
    }


@pytest.mark.parametrize('loader', ['val_dataloader', 'test_dataloader'])
def test_classes_that_never_occur_where_scores_are_measured(tmp_path, loader):
    root = write(tmp_path, [half(1)] * 6)
    one = said(census_of(root, ('background', 'a', 'c'), loader=loader))
    assert one['class-never-occurs'] == (
        "class 'c' never occurs in 6 pictures: not measured here; to measure it, add pictures that "
        'have it'
    )
    two = said(census_of(root, ('background', 'a', 'c', 'd'), loader=loader))
    assert two['class-never-occurs'].endswith(
        "('c', 'd') in 6 pictures: not measured here; to measure them, add pictures that have them"
    )


def test_colours_and_the_command(tmp_path):
    red = np.zeros((4, 6, 3))
    red[:, :3] = 128, 0, 0
    census = census_of(write(tmp_path, [red, red]))
    (finding,) = census.findings
    assert finding.message == (
        '2 of 2 label maps are in colour (#000000 50 %, #800000 50 %), and should have one number '
        f'per pixel, the class: make indices of them with mmslak prepare-data labels {tmp_path}/ann'
        f" {tmp_path}/ann_indices --map '#000000:0' '#800000:1', a number of a class for each "
        f"colour, and set seg_map_path='{tmp_path}/ann_indices'"
    )
    assert (finding.kind, finding.stops, finding.count) == ('colour-label-maps', True, 2)
    assert finding.files == (f'{tmp_path}/ann/0.png', f'{tmp_path}/ann/1.png')


def test_palettes_are_indices_but_for_opencv(tmp_path):
    root = write(tmp_path, [half(1)])
    labels = Image.fromarray(half(1).astype(np.uint8), mode='P')
    labels.putpalette([0, 0, 0, 255, 0, 0])
    labels.save(root / 'ann/0.png')
    assert census_of(root).findings == []
    loads = [dict(type='LoadAnnotations', imdecode_backend='cv2', _scope_='mmseg')]
    (finding,) = census_of(root, pipeline=loads).findings
    assert '(#000000 50 %, #ff0000 50 %)' in finding.message
    assert "set imdecode_backend='pillow' of LoadAnnotations" in finding.message


def test_jpegs_blur(tmp_path):
    maps = [np.kron(half(1), np.ones((8, 8))) * 200]
    census = census_of(write(tmp_path, maps, suffix='.jpg'), seg_map_suffix='.jpg')
    assert said(census)['jpeg-label-maps'].startswith('1 of 1 label maps are JPEGs')


def test_one_bit_and_sixteen(tmp_path):
    root = write(tmp_path, [half(1), half(1)])
    Image.fromarray(half(1).astype(bool)).save(root / 'ann/0.png')
    Image.fromarray(half(257, 256).astype(np.uint16)).save(root / 'ann/1.png')
    census = census_of(root)
    assert census.table == [Row('background', 2, 24), Row('coin', 2, 24)]
    assert [f.kind for f in census.findings] == ['label-map-16-bit']


@pytest.mark.parametrize(('suffix', 'picture', 'kind', 'setting'), [
    ('.png', '.JPG', 'no-picture', "set img_suffix='.JPG' of the dataset"),
    ('.bmp', '.jpg', 'label-map-absent', "set seg_map_suffix='.bmp' of the dataset"),
])  # fmt: skip
def test_suffixes_that_nothing_has(suffix, picture, kind, setting, tmp_path):
    (finding,) = census_of(write(tmp_path, [half(1)] * 2, suffix, picture)).findings
    assert (finding.kind, finding.stops) == (kind, True)
    assert '2 of 2 files' in finding.message
    assert finding.message.endswith(setting)


def test_files_without_partner(tmp_path):
    root = write(tmp_path, [half(1)] * 4)
    (root / 'ann/0.png').unlink()
    (root / 'img/1.jpg').unlink()
    (root / 'img/2.jpg').rename(root / 'img/2.JPG')
    census = census_of(root)
    counts = {f.kind: f.count for f in census.findings}
    assert counts == {
        'pictures-passed-over': 1, 'label-map-absent': 1, 'label-map-without-picture': 2,
    }  # fmt: skip
    assert not any(f.stops for f in census.findings)


def test_files_that_a_list_names_and_that_are_gone(tmp_path):
    root = write(tmp_path, [half(1)] * 4)
    (root / 'list.txt').write_text('0\n1\n2\n')
    (root / 'img/0.jpg').rename(root / 'img/street.jpg')
    (root / 'ann/1.png').unlink()
    census = census_of(root, ann_file=str(root / 'list.txt'))
    assert said(census) == {
        'pictures-absent': f'1 of 3 pictures that {root}/list.txt lists are not in {root}/img: '
        '0.jpg',
        'label-map-absent': f'1 of 3 pictures have no label map: {root}/ann/1.png',
    }
    assert not any(f.stops for f in census.findings)
    for name in ('street', '1', '2'):
        (root / f'img/{name}.jpg').unlink()
    census = census_of(root, ann_file=str(root / 'list.txt'))
    assert [f.kind for f in census.findings if f.stops] == ['pictures-absent']


def test_a_list_with_the_wrong_suffix(tmp_path):
    root = write(tmp_path, [half(1)] * 2, picture='.JPG')
    (root / 'list.txt').write_text('0\n1\n')
    assert said(census_of(root, ann_file=str(root / 'list.txt')))['pictures-absent'].endswith(
        f": 0.jpg, 1.jpg; there is {root}/img/0.JPG, and img_suffix is '.jpg'"
    )


def test_broken_label_maps_are_counted(tmp_path):
    root = write(tmp_path, [half(1)] * 2)
    (root / 'ann/0.png').write_bytes(b'nothing')
    assert said(census_of(root)) == {
        'label-map-unreadable': f'1 of 2 label maps cannot be read, such as {tmp_path}/ann/0.png'
    }


def test_labels_that_another_transform_reads_are_left_to_it(tmp_path):
    root = write(tmp_path, [half(1)])
    (root / 'ann/0.png').write_bytes(b'of another form')
    loads = [dict(type='LoadBiomedicalAnnotation', _scope_='mmseg')]
    assert census_of(root, pipeline=loads) == Census()


def test_hidden_files_are_none(tmp_path):
    root = write(tmp_path, [half(1)])
    (root / 'ann/._0.png').touch()
    assert census_of(root).findings == []


def test_the_sample_is_even(tmp_path):
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly([1, 2], 4) == [1, 2]
    chosen = evenly(list(range(20_210)))
    assert len(set(chosen)) == SAMPLE
    assert set(np.diff(chosen)) <= {40, 41}


def test_a_sample_may_lack_rare_classes(tmp_path, monkeypatch):
    monkeypatch.setattr('mmslak.datasets.census_label_maps.SAMPLE', 2)
    monkeypatch.setattr(evenly, '__defaults__', (2,))
    root = write(tmp_path, [half(1), half(2), half(1)])
    many = ('a', 'b', *map(str, range(2, 12)))
    census = census_of(root, many)
    assert census.sampled == (2, 3)
    assert said(census)['class-never-occurs'].startswith(
        "10 of 12 classes never occur ('2', '3', '4', '5', '6' and 5 more) in 2 label maps that "
        'were read of 3'
    )
    assert census_of(root, many, full=True).sampled is None
    full = np.arange(24).reshape(4, 6).clip(0, 10)
    write(root, [full, half(2), full])
    assert census_of(root, many).findings == []  # '11' alone may be in the third map


def test_labels_are_those_that_mmseg_makes(tmp_path):
    from mmseg.datasets import ADE20KDataset, BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / 'all.png')
    few = dict(classes=('sky', 'wall'))
    for dataset in (
        BaseSegDataset(lazy_init=True),
        ADE20KDataset(lazy_init=True),
        ADE20KDataset(lazy_init=True, metainfo=few),
    ):
        data = dict(
            seg_map_path=str(tmp_path / 'all.png'), seg_fields=[], label_map=dataset.label_map,
            reduce_zero_label=dataset.reduce_zero_label,
        )  # fmt: skip
        loaded = LoadAnnotations()(data)['gt_seg_map']
        assert labels_of_values(dataset)[values].tolist() == loaded.tolist()
