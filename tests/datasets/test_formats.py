"""Formats of people's data, recognised from small literal folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmslak.datasets.formats import complete_splits, recognise
from mmslak.datasets.formats.description import Sample
from mmslak.datasets.formats.files import split_of
from mmslak.datasets.formats.label_maps import data_folder, find_pairs, name_classes, parts, shares
from mmslak.datasets.formats.split import divide
from mmslak.errors import UserError

SIZE = (96, 72)  # width, height


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}


def save_picture(path: Path, size: tuple[int, int] = SIZE, mode: str = 'RGB') -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def save_labels(path: Path, values: list[int], size: tuple[int, int] = SIZE) -> None:
    """A label map, each value in a row of its own; the first in all rows that are left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full((size[1], size[0]), values[0], np.uint8)
    labels[1 : len(values)] = np.array(values[1:], np.uint8)[:, None]
    labels[-20:] = values[-1]
    Image.fromarray(labels).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


# ---------------------------------------------------------------- the five formats, small


def write_label_maps(root: Path, suffixes: tuple = ('.JPG',)) -> dict[Path, bytes]:
    """Ten pictures in two folders, and their masks; without a split."""
    for i in range(10):
        save_picture(root / f'images/site {i % 2}/Bild ä{i}{suffixes[i // 2 % len(suffixes)]}')
        save_labels(root / f'masks/site {i % 2}/Bild ä{i}_mask.png', [0, 1])
    return contents(root)


def coco(count: int, classes: list[str], first: int = 0, masks: bool = True) -> dict:
    """A COCO file about COUNT pictures with an object of each class."""
    images = [
        dict(id=i, file_name=f'{i}.jpg', width=SIZE[0], height=SIZE[1])
        for i in range(first, first + count)
    ]
    annotations = []
    for image in images:
        for number, _ in enumerate(classes):
            x, y = 5 + 10 * number, 8
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image['id'],
                    category_id=number + 1,
                    bbox=[x, y, 40, 50],
                    area=2000,
                    iscrowd=0,
                )
            )
            if masks:
                polygon = [x, y, x + 40, y, x + 40, y + 50, x, y + 50]
                annotations[-1]['segmentation'] = [polygon]
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


def write_coco_file(root: Path) -> dict[Path, bytes]:
    """One file for ten pictures, which are beside it in a folder."""
    for i in range(10):
        save_picture(root / f'pictures/{i}.jpg')
    write(root / 'labels.json', json.dumps(coco(10, ['hard hat', 'person'])))
    return contents(root)


def xml(name: str, things: list[tuple], size: tuple[int, int] = SIZE) -> str:
    """VOC's annotation of things (class, xmin, ymin, xmax, ymax)."""
    objects = ''.join(
        f'<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>'
        f'<ymax>{d}</ymax></bndbox></object>'
        for n, a, b, c, d in things
    )
    return (
        f'<annotation><filename>{name}</filename><size><width>{size[0]}</width>'
        f'<height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>'
    )


def write_voc_folder(root: Path) -> dict[Path, bytes]:
    """JPEGImages and Annotations alone, with pictures of two suffixes."""
    for i in range(10):
        suffix = '.jpg' if i % 2 else '.JPG'
        save_picture(root / f'JPEGImages/{i}{suffix}')
        things = [('helmet', 6, 9, 45, 58), ('person', 16, 9, 55, 58)]
        write(root / f'Annotations/{i}.xml', xml(f'{i}{suffix}', things))
    return contents(root)


def write_yolo(root: Path) -> dict[Path, bytes]:
    """Boxes, with a split that the YAML file names as exports do, from beside its folder."""
    for split, numbers in (('train', range(8)), ('valid', range(8, 10))):
        for i in numbers:
            save_picture(root / f'{split}/images/{i}.jpg')
            write(root / f'{split}/labels/{i}.txt', '0 0.5 0.5 0.5 0.6\r\n1 0.4 0.5 0.5 0.5\r\n')
    names = 'names: {0: hard hat, 1: person}'
    write(root / 'data.yaml', f'train: ../train/images\nval: ../valid/images\n{names}\n')
    return contents(root)


def write_class_folders(root: Path) -> dict[Path, bytes]:
    """Two classes with ten pictures each."""
    for name in ('cats', 'big dogs'):
        for i in range(10):
            save_picture(root / f'{name}/{i}.jpeg')
    return contents(root)


# ---------------------------------------------------------------- label maps


def shown(pairs: list[tuple[str, str]]) -> list[str]:
    return [f'{picture} {label}' for picture, label in pairs]


@pytest.mark.parametrize(
    'pair',
    [
        'images/train/a.jpg labels/train/a.png',
        'train/images/a.jpg train/masks/a.png',
        'img/a.JPG ann/a.png',
        'a.jpg a_mask.png',
        'JPEGImages/a.jpg SegmentationClass/a.png',
        'train/a.png trainannot/a.png',
        'train/a.jpg train_masks/a_mask.gif',
        'images_prepped_train/a.jpg annotations_prepped_train/a.png',
        'leftImg8bit/val/ulm/u_1_leftImg8bit.png gtFine/val/ulm/u_1_gtFine_labelIds.png',
        'train/1_sat.jpg train/1_mask.png',
        'images_2/a.jpg masks_2/a.png',
    ],
)
def test_a_picture_finds_its_label_map(pair):
    found, notes = find_pairs(sorted(pair.split(' ')))
    assert shown(found) == [pair]
    assert notes == []


def test_what_has_no_partner_is_noted():
    files = ['images/a.jpg', 'images/b.jpg', 'images/b.png', 'images/c.jpg']
    pairs, notes = find_pairs(
        [*files, 'masks/a.png', 'masks/b.png', 'masks/d.png', 'masks/d_color.png']
    )
    assert shown(pairs) == ['images/a.jpg masks/a.png', 'images/b.jpg masks/b.png']
    assert notes == [
        'left out, since another one has the name and label map: 1 picture: images/b.png',
        'left out: 1 picture without label map: images/c.jpg',
        '1 label maps without picture are left out: masks/d.png',
    ]


@pytest.mark.parametrize('name', ['masks', 'colours', 'Colour maps', 'train_colours'])
def test_made_indices_go_before_what_they_were_made_of(name):
    picture = 'images/train/a.jpg' if 'train' in name else 'images/a.jpg'
    pairs, notes = find_pairs([picture, f'{name}/a.png', f'{name}_indices/a.png'])
    assert shown(pairs) == [f'{picture} {name}_indices/a.png']
    assert notes == [f'{name}: 1 label maps are passed over, since {name}_indices was made of them']


def test_two_label_maps_of_a_picture():
    pairs, notes = find_pairs(['images/a.jpg', 'annotations/a.png', 'masks/a.png'])
    assert shown(pairs) == ['images/a.jpg annotations/a.png']
    assert notes == ['1 label maps are left out, since their pictures have others: masks/a.png']


@pytest.mark.parametrize(
    ('labels', 'data'),
    [
        ('data/mine/masks_indices', 'data/mine'),
        ('data/mine/masks/train', 'data/mine'),
        ('data/mine/train/labels/site1', 'data/mine'),
        ('masks', '.'),
        ('/masks', '/'),
    ],
)
def test_the_folder_of_the_data_of_label_maps(labels, data):
    assert data_folder(Path(labels)) == Path(data)


def test_pictures_of_two_folders_are_not_mixed_up():
    files = [f'{kind}_{i}/a.png' for kind in ('images', 'masks') for i in (1, 2)]
    assert shown(find_pairs(files)[0]) == [
        'images_1/a.png masks_1/a.png',
        'images_2/a.png masks_2/a.png',
    ]


@pytest.mark.parametrize(
    ('picture', 'label', 'expected'),
    [
        ('images/x/a.jpg', 'masks/x/a_mask.png', ('images', 'masks', '.jpg', '_mask.png', 'x/a')),
        ('a.jpg', 'a_mask.png', ('', '', '.jpg', '_mask.png', 'a')),
        ('i/u_leftImg8bit.png', 'g/u_gt.png', ('i', 'g', '_leftImg8bit.png', '_gt.png', 'u')),
        ('t/i/a.b.jpg', 't/m/a.b.png', ('t/i', 't/m', '.jpg', '.png', 'a.b')),
    ],
)
def test_parts_of_a_pair(picture, label, expected):
    assert parts(picture, label) == expected


def label_maps(root: Path, *values: list[int], mode: str = 'L', suffix: str = '.png'):
    """Label maps of some values, recognised."""
    for i, own in enumerate(values):
        save_picture(root / f'images/{i}.jpg')
        path = root / f'masks/{i}{suffix}'
        save_labels(path, own)
        if mode != 'L':
            Image.open(path).convert(mode).save(path)
    return recognise(root)


def test_a_devkit_of_label_maps_has_its_lists(tmp_path):
    for name in 'abcd':
        save_picture(tmp_path / f'JPEGImages/{name}.jpg')
        if name != 'd':
            save_labels(tmp_path / f'SegmentationClass/{name}.png', [0, 1, 255])
            save_labels(tmp_path / f'SegmentationObject/{name}.png', [0, 9, 255])
        write(tmp_path / f'Annotations/{name}.xml', xml(f'{name}.jpg', [('cat', 6, 9, 45, 58)]))
    for split, names in (('train', 'b\r\nc\r\n'), ('val', 'a\n'), ('trainval', 'a\nb\nc\n')):
        write(tmp_path / f'ImageSets/Segmentation/{split}.txt', names)
    data = recognise(tmp_path, ['label-maps'])
    assert {s: [x.path[-5] for x in found] for s, found in data.splits.items()} == dict(
        val=['a'], train=['b', 'c']
    )
    assert data.notes == ['left out: 1 picture without label map: JPEGImages/d.jpg']
    assert recognise(tmp_path).format == 'voc'


def test_values_and_their_names(tmp_path):
    data = label_maps(tmp_path, [0, 1], [0, 2, 255])
    assert (data.format, data.kind, data.classes) == ('label-maps', 'segmentation', ())
    assert list(data.values) == [0, 1, 2, 255]
    assert sum(data.values.values()) == pytest.approx(1)
    name_classes(data, ['background', 'road', 'car'])
    assert data.classes == ('background', 'road', 'car')
    assert [set(sample.classes) for sample in data.splits['']] == [{0, 1}, {0, 2}]
    assert not data.ignore_zero


@pytest.mark.parametrize(('values', 'ignored'), [([0, 1, 2], 0), ([1, 2], 255)])
def test_zero_is_no_class(tmp_path, values, ignored):
    data = label_maps(tmp_path, values)
    name_classes(data, ['road', 'car'], ignored)
    assert data.ignore_zero
    assert set(data.splits[''][0].classes) == {0, 1}


def write_palettes(root: Path) -> None:
    """Two pictures and their label maps of 0 and 1, which have the colours black and dark red."""
    for i in range(2):
        save_picture(root / f'img/{i}.png')
        save_labels(root / f'ann/{i}.png', [0, 1])
        labels = Image.open(root / f'ann/{i}.png')
        labels.putpalette([0, 0, 0, 128, 0, 0, *[7] * 762])
        labels.save(root / f'ann/{i}.png')


def test_colours_of_palette_files_are_those_of_the_classes(tmp_path):
    write_palettes(tmp_path)
    data = recognise(tmp_path)
    assert list(data.values) == [0, 1]
    name_classes(data, ['background', 'coin'])
    assert data.palette == [[0, 0, 0], [128, 0, 0]]


def test_one_bit_maps_have_zero_and_one(tmp_path):
    for i in range(2):
        save_picture(tmp_path / f'img/{i}.jpg')
        save_labels(tmp_path / f'ann/{i}.png', [0, 255])
        Image.open(tmp_path / f'ann/{i}.png').convert('1').save(tmp_path / f'ann/{i}.png')
    assert list(recognise(tmp_path).values) == [0, 1]


@pytest.mark.parametrize(
    ('values', 'options', 'message'),
    [
        ([0, 255], {}, r'values 0, 255 alone.* labels \S+/masks \S+/masks_indices --map 255:1$'),
        (
            [0, 1],
            dict(mode='RGB'),
            r'0.png is in colour \(RGB\).*prepare-data labels \S+/masks lists',
        ),
        (
            [0, 100],
            dict(suffix='.jpg'),
            r'0.jpg is a JPEG, whose values are blurred.*prepare-data labels',
        ),
    ],
)
def test_label_maps_that_teach_something_else(tmp_path, values, options, message):
    with pytest.raises(UserError, match=message):
        label_maps(tmp_path, values, **options)


def test_label_maps_beside_their_pictures_get_a_folder_first(tmp_path):
    save_picture(tmp_path / 'a.jpg')
    save_labels(tmp_path / 'a_mask.png', [0, 255])
    with pytest.raises(UserError, match='put the label maps into a folder of their own, then mmsl'):
        recognise(tmp_path)


def test_deep_label_maps(tmp_path):
    save_picture(tmp_path / 'img/a.jpg')
    (tmp_path / 'ann').mkdir()
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / 'ann/a.png')
    with pytest.raises(UserError, match=r'ann/a.png has the value 1000; expected 0 to 254'):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ('names', 'ignored', 'message'),
    [
        (
            ['a'],
            255,
            r'1 names, but .* values 0 \(69%\), 7 \(1%\), 26 \(29%\): 27 names .*--map 7:1 26:2$',
        ),
        (
            ['a'] * 26,
            255,
            r": 27 names are needed, for 0 to 26: one is missing. If 0 is no class, and 'a' is "
            r'the name of 1, add --ignore 0$',
        ),
        (['a'] * 25, 0, r': 26 names are needed, for 1 to 26; or renumber them'),
        (['a', 'b', 'c'], 7, r'--ignore 7: the libraries ignore 255, or 0; .* --map 7:255'),
    ],
)
def test_names_that_do_not_fit(tmp_path, names, ignored, message):
    with pytest.raises(UserError, match=message):
        name_classes(label_maps(tmp_path, [0, 7, 26]), names, ignored)


@pytest.mark.parametrize(
    ('names', 'values', 'noted'),
    [
        (['background', 'building', 'road'], [0, 1, 2, 3], True),  # LoveDA: 0 has no data
        (['Background', 'building', 'road'], [1, 2, 3], False),
        (['building', 'road', 'water'], [0, 1, 2, 3], False),
    ],
)
def test_a_background_beside_an_ignored_zero_is_noted(tmp_path, names, values, noted):
    data = label_maps(tmp_path, values)
    name_classes(data, names, 0)
    assert (data.classes, data.ignore_zero) == (tuple(names), True)
    said = f'0 is no class, and {names[0]!r} is the name of 1; if it is 0, leave out --ignore 0'
    assert (said in data.notes) == noted


def test_values_are_shown_with_their_shares(tmp_path):
    data = label_maps(tmp_path, [0, 1])
    data.values = {0: 0.5, 1: 0.01, 7: 0.0099, 255: 0.4801}
    assert shares(data) == ['0 (50%)', '1 (1%)', '7 (<1%)']


def test_one_class_alone_teaches_nothing(tmp_path):
    with pytest.raises(UserError, match="one class alone, 'coin'"):
        name_classes(label_maps(tmp_path, [0, 1]), ['coin'], 0)


# ---------------------------------------------------------------- COCO


@pytest.mark.parametrize(
    ('files', 'prefixes'),
    [
        (
            {
                'annotations/instances_train2017.json': 'train2017',
                'annotations/instances_val2017.json': 'val2017',
            },
            {'train': 'train2017/', 'val': 'val2017/'},
        ),
        (
            {'train/_annotations.coco.json': 'train', 'valid/_annotations.coco.json': 'valid'},
            {'train': 'train/', 'val': 'valid/'},
        ),
        ({'train.json': 'images', 'test.json': 'images'}, {'train': 'images/', 'test': 'images/'}),
    ],
)
def test_coco_files_with_their_pictures(tmp_path, files, prefixes):
    for number, (file, folder) in enumerate(files.items()):
        content = coco(2, ['b', 'a'], first=10 * number)
        content['categories'].append(dict(id=9, name='objects', supercategory='none'))
        for image in content['images']:
            save_picture(tmp_path / folder / image['file_name'])
        write(tmp_path / file, json.dumps(content))
    write(
        tmp_path / 'annotations/captions_train2017.json',
        json.dumps(dict(images=[], annotations=[])),
    )
    data = recognise(tmp_path)
    assert (data.format, data.kind, data.classes) == ('coco', 'masks', ('b', 'a'))
    assert {s: d['data_prefix']['img'] for s, d in data.direct.items()} == prefixes
    assert {s: d['ann_file'] for s, d in data.direct.items()} == dict(zip(prefixes, files))
    assert data.notes == ['left out, since no object is of them: objects']
    assert [data.pictures(split) for split in prefixes] == [2, 2]


def of_one_file(root: Path, content: dict, folder: str = 'img'):
    """The data of one COCO file, with a byte order mark."""
    for i in range(3):
        save_picture(root / folder / f'{i}.jpg')
    (root / 'all.json').write_bytes(b'\xef\xbb\xbf' + json.dumps(content).encode())
    return recognise(root)


def test_one_coco_file_is_read_as_it_is(tmp_path):
    data = of_one_file(tmp_path, coco(3, ['a']))
    assert data.direct == {
        '': dict(type='CocoDataset', ann_file='all.json', data_prefix=dict(img='img/'))
    }


@pytest.mark.parametrize('change', ['text ids', 'no area', 'backslash', 'absent', 'two names'])
def test_coco_files_that_are_written_anew(tmp_path, change):
    """What the library or the metric stumbles over is put right in a copy."""
    content = coco(3, ['a', 'b'])
    if change == 'text ids':
        for image in content['images']:
            image['id'] = str(image['id'])
    elif change == 'no area':
        for thing in content['annotations']:
            del thing['area'], thing['iscrowd']
    elif change == 'backslash':
        for image in content['images']:
            image['file_name'] = f'C:\\pictures\\{image["file_name"]}'
    elif change == 'absent':
        content['images'].append(dict(id=7, file_name='gone.jpg', width=9, height=9))
    else:
        content['categories'][1]['name'] = 'a'
    data = of_one_file(tmp_path, content)
    assert data.direct == {}
    assert [sample.path for sample in data.splits['']] == ['img/0.jpg', 'img/1.jpg', 'img/2.jpg']
    thing = data.splits[''][0].label[0]
    assert (thing['bbox'], thing['area'], thing['iscrowd']) == ([5, 8, 40, 50], 2000, 0)
    assert data.classes == (('a',) if change == 'two names' else ('a', 'b'))
    assert bool(data.notes) == (change == 'absent')


def test_classes_in_another_order_are_written_anew(tmp_path):
    """The library numbers classes in the order of each file."""
    for split, names in (('train', ['a', 'b']), ('val', ['b', 'a'])):
        for i in range(2):
            save_picture(tmp_path / split / f'{i}.jpg')
        write(tmp_path / f'{split}.json', json.dumps(coco(2, names)))
    data = recognise(tmp_path)
    assert data.classes == ('a', 'b')
    assert set(data.direct) == {'train'}
    assert [thing['category_id'] for thing in data.splits['val'][0].label] == [1, 0]


def test_some_objects_without_mask(tmp_path):
    content = coco(3, ['a'])
    del content['annotations'][0]['segmentation']
    data = of_one_file(tmp_path, content)
    assert data.kind == 'boxes'
    assert data.notes[0].startswith('1 of 3 objects have no mask: boxes are used')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(category_id=5), r'1 annotation with category_id 5, which no category has; .* 1$'),
        (dict(bbox=[1, 2]), r'annotation 1 has bbox \[1, 2\]; expected \[x, y, width, height\]'),
    ],
)
def test_wrong_annotations(tmp_path, change, message):
    content = coco(3, ['a'], masks=False)
    content['annotations'][0].update(change)
    with pytest.raises(UserError, match=message):
        of_one_file(tmp_path, content)


def test_coco_without_its_pictures(tmp_path):
    save_picture(tmp_path / 'img/other.jpg')
    write(tmp_path / 'all.json', json.dumps(coco(3, ['a'])))
    with pytest.raises(UserError, match=r'none of the 3 pictures of .*all.json is in .*: 0.jpg'):
        recognise(tmp_path)


def test_two_files_for_the_same_pictures(tmp_path):
    of_one_file(tmp_path, coco(3, ['a']))
    write(tmp_path / 'more.json', json.dumps(coco(3, ['a'])))
    with pytest.raises(UserError, match=r'2 files .* all.json, more.json; give the one to use'):
        recognise(tmp_path)
    assert recognise(tmp_path / 'more.json').direct['']['ann_file'] == 'more.json'


def test_a_broken_file_is_named(tmp_path):
    save_picture(tmp_path / 'img/0.jpg')
    write(tmp_path / 'annotations.json', '{"images": [')
    with pytest.raises(UserError, match=r'annotations.json cannot be read as JSON'):
        recognise(tmp_path)


# ---------------------------------------------------------------- VOC


def write_devkit(root: Path, **lists: list[int]) -> None:
    """VOC2007 with .jpg pictures, and lists of their numbers."""
    for i in {i for numbers in lists.values() for i in numbers}:
        save_picture(root / f'VOC2007/JPEGImages/{i}.jpg')
        write(root / f'VOC2007/Annotations/{i}.xml', xml(f'{i}.jpg', [('helmet', 6, 9, 45, 58)]))
    for name, numbers in lists.items():
        text = ''.join(f'{i}\r\n' for i in numbers)
        write(root / f'VOC2007/ImageSets/Main/{name}.txt', text)


@pytest.mark.parametrize(
    ('lists', 'expected'),
    [
        (dict(train=[0], val=[1], trainval=[0, 1], test=[2]), ['train', 'val', 'test']),
        (dict(trainval=[0, 1], test=[2]), ['trainval', 'test']),
    ],
)
def test_a_devkit_is_read_as_it_is(tmp_path, lists, expected):
    write_devkit(tmp_path, **lists)
    data = recognise(tmp_path)
    assert (data.format, data.kind, data.classes) == ('voc', 'boxes', ('helmet',))
    files = [f'VOC2007/ImageSets/Main/{name}.txt' for name in expected]
    assert [d['ann_file'] for d in data.direct.values()] == files
    assert {d['data_prefix']['sub_data_root'] for d in data.direct.values()} == {'VOC2007/'}
    assert recognise(tmp_path / 'VOC2007').direct['train']['data_prefix'] == dict(
        sub_data_root='./'
    )


def test_a_test_set_without_annotations_is_left_out(tmp_path):
    write_devkit(tmp_path, train=[0], val=[1])
    write(tmp_path / 'VOC2007/ImageSets/Main/test.txt', '7\n')
    assert set(recognise(tmp_path).splits) == {'train', 'val'}


def test_bare_xml_files_beside_their_pictures(tmp_path):
    for i in range(3):
        save_picture(tmp_path / f'{i}.png')
        size = (0, 0) if i else SIZE  # as some tools write it
        write(tmp_path / f'{i}.xml', xml('other.png', [('a b', 6, 9, 45, 58)], size))
    save_picture(tmp_path / 'bare.png')
    data = recognise(tmp_path)
    assert data.classes == ('a b',)
    assert data.direct == {}
    assert [s.size for s in data.splits['']] == [SIZE] * 3
    assert data.splits[''][0].label[0]['bbox'] == [5, 8, 39, 49]
    assert data.notes == ['left out: 1 picture without XML file']


def test_an_object_without_a_box(tmp_path):
    save_picture(tmp_path / '0.jpg')
    write(tmp_path / '0.xml', '<annotation><object><name>a</name></object></annotation>')
    with pytest.raises(UserError, match=r'0.xml: an object without name or without bndbox'):
        recognise(tmp_path)


# ---------------------------------------------------------------- YOLO


def yolo(root: Path, line: str, yaml: str = 'names: [a, b]\ntrain: images\nval: images\n'):
    """Two pictures with one line each, recognised."""
    for i in range(2):
        save_picture(root / f'images/{i}.jpg')
        write(root / f'labels/{i}.txt', line)
    write(root / 'data.yaml', yaml)
    return recognise(root)


def test_yolo_boxes(tmp_path):
    write_yolo(tmp_path)
    data = recognise(tmp_path)
    assert (data.format, data.kind, data.classes) == ('yolo', 'boxes', ('hard hat', 'person'))
    assert [data.pictures(split) for split in ('train', 'val')] == [8, 2]
    first = data.splits['train'][0]
    assert (first.path, first.size) == ('train/images/0.jpg', SIZE)
    assert [thing['bbox'] for thing in first.label] == [[24, 14.4, 48, 43.2], [14.4, 18, 48, 36]]
    assert first.classes == {0, 1}


def test_yolo_polygons(tmp_path):
    data = yolo(tmp_path, '1 0.25 0.25 0.75 0.25 0.75 0.75')
    assert data.kind == 'masks'
    assert list(data.splits) == ['train'], 'val is the same pictures'
    (thing,) = data.splits['train'][0].label
    assert thing['segmentation'] == [[24, 18, 72, 18, 72, 54]]
    assert thing['bbox'] == [24, 18, 48, 36]


def test_yolo_pictures_turned_by_exif(tmp_path):
    data = yolo(tmp_path, '0 0.5 0.5 0.5 0.5')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', SIZE).save(tmp_path / 'images/1.jpg', exif=exif)
    data = recognise(tmp_path)
    assert [sample.size for sample in data.splits['train']] == [SIZE, SIZE[::-1]]


@pytest.mark.parametrize(
    ('line', 'yaml', 'message'),
    [
        ('2 0.5 0.5 0.5 0.5', 'names: [a, b]', r'0.txt:1 is of class 2, but 2 classes have names'),
        (
            '0 50 50 20 20',
            'names: [a, b]',
            r'no object in the 2 .*0.txt:1 .* is none; expected CLASS',
        ),
        ('0 0.5 0.5 0.5 0.5', 'names: {1: a}', r'names has the numbers 1; expected 0, 1, 2'),
        ('0 0.5 0.5 0.5 0.5', 'names: [a', r'data.yaml cannot be read as YAML'),
    ],
)
def test_wrong_yolo(tmp_path, line, yaml, message):
    with pytest.raises(UserError, match=message):
        yolo(tmp_path, line, yaml)


def test_lines_that_are_no_object_are_noted(tmp_path):
    yolo(tmp_path, '0 0.5 0.5 0.5 0.5')
    write(tmp_path / 'labels/1.txt', 'a b\n\n0 0.1 0.1\n0 0.5 0.5 0.5 0.5 0.9')
    save_picture(tmp_path / 'images/empty.jpg')
    data = recognise(tmp_path)
    assert [len(sample.label) for sample in data.splits['train']] == [1, 1, 0]
    assert data.notes == [
        '1 picture without text file: nothing is on them',
        "left out: 2 lines of no object: labels/1.txt:1 ('a b')",
    ]


# ---------------------------------------------------------------- class folders


def test_class_folders(tmp_path):
    write_class_folders(tmp_path)
    data = recognise(tmp_path)
    assert (data.format, data.kind) == ('class-folders', 'classification')
    assert data.classes == ('big dogs', 'cats')
    assert data.splits[''][0] == Sample('big dogs/0.jpeg', frozenset([0]), 0)
    assert data.direct == {'': dict(type='CustomDataset', data_prefix='')}


def test_class_folders_with_a_split(tmp_path):
    for path in ('Train/a/0.jpg', 'Train/b/0.jpg', 'Train/b/more/1.jpg', 'valid/a/0.jpg', 'x.jpg'):
        save_picture(tmp_path / path)
    data = recognise(tmp_path)
    assert [data.pictures(split) for split in ('train', 'val')] == [3, 1]
    # The library would number the classes of val anew, and so wrongly where one is missing.
    assert data.direct == {'train': dict(type='CustomDataset', data_prefix='Train')}
    assert data.notes == ['left out: 1 picture in no folder of a class']


def test_a_class_that_is_called_like_a_split(tmp_path):
    for path in ('train/0.jpg', 'bus/0.jpg'):
        save_picture(tmp_path / path)
    assert recognise(tmp_path).classes == ('bus', 'train')


def test_one_folder_is_no_classification(tmp_path):
    save_picture(tmp_path / 'cats/0.jpg')
    with pytest.raises(UserError, match=r'cats is the only folder with pictures'):
        recognise(tmp_path)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ((), r'no picture in it; there are nothing; expected COCO files'),
        (('a.jpg', 'b.jpg'), r'not recognised \(2 .jpg\); expected COCO'),
        (('images/a.jpg', 'images/b.jpg'), r'not recognised'),
    ],
)
def test_what_is_not_recognised(tmp_path, files, message):
    for file in files:
        save_picture(tmp_path / file)
    with pytest.raises(UserError, match=message):
        recognise(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match='nowhere: no such folder'):
        recognise(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('names', 'split'),
    [
        (('instances_train2017',), 'train'),
        (('captions', 'Valid'), 'val'),
        (('test_site', 'train'), 'train'),  # a whole name before a part of one
        (('training',), 'train'),
        (('contest', 'trains'), None),
    ],
)
def test_splits_by_name(names, split):
    assert split_of(*names) == split


def samples(count: int, *classes: int) -> list[Sample]:
    """Samples that have some classes each."""
    return [Sample(f'{i}-{classes}.jpg', frozenset(classes)) for i in range(count)]


def test_every_class_is_divided_alike():
    train, val = divide([*samples(40, 0), *samples(10, 1)])
    assert [sum(n in s.classes for s in val) for n in (0, 1)] == [8, 2]
    assert len(train) == 40


@pytest.mark.parametrize('name', 'abcdefgh')  # a hash of names decides
def test_small_classes_are_divided_alike(name):
    folders = [Sample(f'{name}{n}/{i}.jpg', frozenset({n})) for n in range(3) for i in range(8)]
    _, val = divide(folders)
    assert sorted(sum(n in s.classes for s in val) for n in range(3)) == [1, 2, 2]


@pytest.mark.parametrize('name', 'abcdefgh')
def test_the_commonest_class_is_in_val(name):
    """Of 10 pictures 2 are for val: the rare classes must not have both."""
    counts = {1: 2, 2: 1, 0: 7}
    data = [Sample(f'{name}{n}-{i}.jpg', frozenset({n})) for n in counts for i in range(counts[n])]
    _, val = divide(data)
    assert any(0 in s.classes for s in val)


def test_what_is_rare_is_trained_on():
    everything = [*samples(20, 0), *samples(1, 1), *samples(1, 0, 2)]
    train, val = divide(everything)
    assert {n for s in train for n in s.classes} == {0, 1, 2}
    assert {n for s in val for n in s.classes} == {0}


@pytest.mark.parametrize(
    ('data', 'sizes'),
    [
        (samples(3, 0), (2, 1)),
        (samples(2, 0), (1, 1)),
        (samples(1, 0), (1, 1)),
        ([*samples(1, 0), *samples(1, 1)], (2, 2)),  # val is train
    ],
)
def test_few_pictures(data, sizes):
    train, val = divide(data)
    assert (len(train), len(val)) == sizes


def test_a_new_picture_moves_few_others():
    before = {s.path for s in divide(samples(50, 0))[1]}
    again = {s.path for s in divide(samples(50, 0)[::-1])[1]}
    after = {s.path for s in divide(samples(51, 0))[1]}
    assert before == again
    assert len(before ^ after - {'50-(0,).jpg'}) <= 1


@pytest.mark.parametrize(
    ('there', 'expected'),
    [
        (dict(train=4, val=2, test=1), dict(train=4, val=2, test=1)),
        (dict(train=4, test=1), dict(train=4, val=1)),
        ({'': 10}, dict(train=8, val=2)),
        (dict(train=10), dict(train=8, val=2)),
        ({'': 3, 'train': 4, 'val': 2}, dict(train=4, val=2)),
        ({'': 3, 'val': 2}, dict(train=3, val=2)),
    ],
)
def test_splits_are_completed(tmp_path, there, expected):
    write_class_folders(tmp_path)
    data = recognise(tmp_path)
    data.splits = {split: samples(count, 0) for split, count in there.items()}
    words = complete_splits(data)
    assert {split: len(found) for split, found in data.splits.items()} == expected
    assert words.startswith('a fifth') == (len(there) == 1)


def test_without_pictures_to_train_on(tmp_path):
    write_class_folders(tmp_path)
    data = recognise(tmp_path)
    data.splits = dict(val=samples(2, 0))
    with pytest.raises(UserError, match='pictures of val alone, no train'):
        complete_splits(data)
