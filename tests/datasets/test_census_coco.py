"""What the census says of COCO files, each with exact numbers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmslak.datasets.census import Census, Row, take_census
from mmslak.datasets.census_coco import read_annotations

BALLOON = dict(id=1, name='balloon')
MASKS = [dict(type='mmdet.LoadAnnotations', with_mask=True)]


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def content(boxes: list[tuple], categories: tuple[dict, ...] = (BALLOON,), **more) -> dict:
    """An annotation file: a picture of 100×80 for each (x, y, width, height, category id)."""
    images = [
        dict(id=i, file_name=f'{i}.jpg', width=100, height=80) for i, _ in enumerate(boxes, 1)
    ]
    annotations = [
        dict(
            id=i, image_id=i, bbox=list(box), area=box[2] * box[3], iscrowd=0,
            category_id=category, segmentation=polygon(*box), **more,
        )
        for i, (*box, category) in enumerate(boxes, 1)
    ]  # fmt: skip
    return dict(images=images, annotations=annotations, categories=list(categories))


def census_of(root: Path, values: dict | str, classes: object = ('balloon',), **settings) -> Census:
    from mmdet.datasets import CocoDataset

    loader = settings.pop('loader', '')
    text = values if isinstance(values, str) else json.dumps(values)
    (root / 'a.json').write_text(text)
    if isinstance(values, dict):
        for image in values.get('images', ()):
            file = root / 'img' / image['file_name']
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (1, 1)).save(file)
    dataset = CocoDataset(
        data_root=str(root), ann_file='a.json', data_prefix=dict(img='img'), lazy_init=True,
        metainfo=dict(classes=classes) if classes else None, **settings,
    )  # fmt: skip
    return take_census(dataset, loader=loader)


def only(census: Census, kind: str) -> str:
    """The message of the one finding."""
    assert [finding.kind for finding in census.findings] == [kind]
    return census.findings[0].message


def test_objects_and_pictures_are_counted(tmp_path):
    values = content([(10, 10, 20, 20, 1), (0, 0, 50, 40, 1), (0, 0, 100, 98, 3)])
    values['categories'].append(dict(id=3, name='kite'))
    values['annotations'] += [dict(values['annotations'][0], id=9)]
    values['images'] += [dict(id=7, file_name='deep/7.jpg', width=30, height=40)]
    census = census_of(tmp_path, values, ('balloon', 'kite'))
    assert census.table == [Row('balloon', 2, 3), Row('kite', 1, 1)]
    assert (census.pictures, census.empty, census.unit) == (4, 1, 'objects')
    assert census.sizes == dict(smallest=(30, 40), largest=(100, 80), small=2, medium=1, large=1)
    assert census.findings == []
    assert Census.from_dict(json.loads(json.dumps(census.to_dict()))).table == census.table


def test_categories_of_ones_own_without_metainfo(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 4)
    census = census_of(tmp_path, values, None, filter_cfg=dict(filter_empty_gt=True))
    assert only(census, 'no-class-known') == (
        f"the categories of {tmp_path}/a.json are 'balloon' (4 objects), none of which "
        "CocoDataset looks for (its classes are 'person', 'bicycle', 'car' and 77 more): set "
        "metainfo=dict(classes=('balloon',)) of the dataset, and num_classes=1 of the heads"
    )
    assert census.findings[0].stops
    assert not census_of(tmp_path, values, None, loader='val_dataloader').findings[0].stops


@pytest.mark.parametrize('wanted', ['Balloon', 'balloon ', 'ballon', 'balloons'])
def test_a_name_that_differs(wanted, tmp_path):
    census = census_of(tmp_path, content([(10, 10, 20, 20, 1)]), (wanted,))
    assert f"; 'balloon' is not {wanted!r}): set metainfo=" in only(census, 'no-class-known')

    kite = dict(id=2, name='kite')
    values = content([(10, 10, 20, 20, 1), (10, 10, 20, 20, 2)], (BALLOON, kite))
    assert only(census_of(tmp_path, values, ('kite', wanted)), 'class-name-differs') == (
        f"category 'balloon' of {tmp_path}/a.json (1 object) is left out, and class {wanted!r} "
        "never occurs: names have to be equal, letter by letter; write 'balloon' in "
        'metainfo=dict(classes=…) of the dataset'
    )


def test_categories_that_nobody_looks_for(tmp_path):
    kite = dict(id=2, name='kite')
    values = content([(10, 10, 20, 20, 1), (10, 10, 20, 20, 2)], (BALLOON, kite))
    assert only(census_of(tmp_path, values), 'class-not-looked-for') == (
        f"CocoDataset does not look for 'kite' of {tmp_path}/a.json and leaves 1 object out: to "
        "learn them, set metainfo=dict(classes=('balloon', 'kite')) of the dataset"
    )


def test_labels_follow_the_file_and_not_the_classes(tmp_path):
    kite = dict(id=2, name='kite')
    values = content([(10, 10, 20, 20, 1), (10, 10, 20, 20, 2)], (BALLOON, kite))
    assert only(census_of(tmp_path, values, ('kite', 'balloon')), 'class-order') == (
        f"labels are numbered in the order of {tmp_path}/a.json: 'balloon' has the number 0, "
        "which is 'kite' in the classes of the dataset: set metainfo=dict(classes=('balloon', "
        "'kite'))"
    )


def test_the_filter_that_took_everything(tmp_path):
    values = content([(10, 10, 0.5, 20, 1), (200, 10, 20, 20, 1), (10, 10, 20, 20, 1)])
    values['annotations'][2]['ignore'] = 1
    census = census_of(tmp_path, values)
    assert only(census, 'no-annotation') == (
        f'no annotation of {tmp_path}/a.json is left of 3 boxes: 1 box marked as ignored, '
        '1 box outside of the picture, 1 box below one pixel'
    )
    assert census.findings[0].stops


def test_small_pictures_take_their_boxes_along(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 3)
    values['images'][0].update(width=30)
    census = census_of(tmp_path, values, filter_cfg=dict(filter_empty_gt=True, min_size=32))
    assert census.dropped == {'pictures below 32 pixels (min_size)': 1}
    assert census.table == [Row('balloon', 2, 2)]
    assert 'left out: 1 picture below 32 pixels' in only(census, 'annotations-left-out')
    assert census_of(tmp_path, values, test_mode=True).dropped == {}


def test_a_crowd_is_no_object_and_no_finding(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 2)
    values['annotations'][0]['iscrowd'] = 1
    census = census_of(tmp_path, values)
    assert census.dropped == {'boxes of crowds': 1}
    assert (census.table, census.findings) == ([Row('balloon', 1, 1)], [])


def test_boxes_as_corners(tmp_path):
    corners = [(60, 40, 90, 70, 1), (50, 50, 99, 80, 1), (0, 0, 10, 10, 1)]
    values = content(corners)
    (message,) = [
        f.message for f in census_of(tmp_path, values).findings if f.kind == 'boxes-as-corners'
    ]
    assert message == (
        f'2 of 3 boxes in {tmp_path}/a.json reach outside of their picture as x, y, width, height, '
        'and fit as x1, y1, x2, y2: bbox is [x, y, width, height], for the first one '
        '[60, 40, 30, 30]'
    )
    assert census_of(tmp_path, content([(60, 40, 30, 30, 1)] * 3)).findings == []


def test_boxes_as_shares_of_the_picture(tmp_path):
    census = census_of(tmp_path, content([(0.1, 0.2, 0.5, 0.5, 1)] * 2))
    assert {f.kind for f in census.findings} == {'boxes-as-shares', 'no-annotation'}


def test_ids(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 5)
    values['annotations'][0]['category_id'] = 7
    values['annotations'][1]['image_id'] = 99
    values['annotations'][2]['id'] = values['annotations'][3]['id']
    values['images'].append(dict(values['images'][0]))
    census = census_of(tmp_path, values)
    assert [(f.kind, f.count, f.stops) for f in census.findings][:4] == [
        ('duplicate-ids', 1, False),
        ('duplicate-ids', 1, True),  # which CocoDataset refuses
        ('category-unknown', 1, False),
        ('image-unknown', 1, False),
    ]
    assert '(7) that no category has: they are left out; the categories are 1' in (
        census.findings[2].message
    )


def test_pictures_absent_and_not_listed(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 3)
    census_of(tmp_path, values)
    (tmp_path / 'img/1.jpg').rename(tmp_path / 'img/1.JPG')
    values['images'].pop(), values['annotations'].pop()
    from mmdet.datasets import CocoDataset

    (tmp_path / 'a.json').write_text(json.dumps(values))
    census = take_census(
        CocoDataset(
            data_root=str(tmp_path), ann_file='a.json', data_prefix=dict(img='img'),
            metainfo=dict(classes=('balloon',)), lazy_init=True,
        )
    )  # fmt: skip
    absent, spare = census.findings
    assert absent.message == (
        f'1 of 2 pictures that {tmp_path}/a.json lists are not in {tmp_path}/img: 1.jpg; '
        f'there is {tmp_path}/img/1.JPG'
    )
    assert (spare.kind, spare.count) == ('pictures-not-listed', 2)
    (tmp_path / 'img').rename(tmp_path / 'elsewhere')
    (stop,) = [f for f in take_census(
        CocoDataset(
            data_root=str(tmp_path), ann_file='a.json', data_prefix=dict(img='img'),
            metainfo=dict(classes=('balloon',)), lazy_init=True,
        )
    ).findings if f.stops]  # fmt: skip
    assert stop.message.startswith('2 of 2 pictures')


def test_masks_need_polygons(tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 2)
    for annotation in values['annotations']:
        del annotation['segmentation']
    assert census_of(tmp_path, values).findings == []
    census = census_of(tmp_path, values, pipeline=MASKS)
    assert only(census, 'no-polygons') == (
        f"2 of 2 annotations in {tmp_path}/a.json have no 'segmentation', of which masks are made: "
        'this config trains masks (with_mask=True); give polygons, or use a config of boxes alone, '
        'such as mmslak::faster_rcnn_slak_t_voc07.py with this dataset'
    )
    assert census.findings[0].stops
    values['annotations'][0]['segmentation'] = polygon(1, 2, 3, 4)
    assert not census_of(tmp_path, values, pipeline=MASKS).findings[0].stops


@pytest.mark.parametrize('indent', [None, 2])
def test_polygons_with_two_points(indent, tmp_path):
    values = content([(10, 10, 20, 20, 1)] * 6)
    forms = ([[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6], [-1, 2.5, 3, 4e1, 5, 6, 7]])
    for annotation, form in zip(values['annotations'], forms):
        annotation['segmentation'] = form
    values['annotations'][3]['segmentation'] = dict(size=[80, 100], counts=[8000])
    values['annotations'][4]['note'] = '"segmentation": [[1, 2]]'
    census_of(tmp_path, values)  # writes the pictures
    census = census_of(tmp_path, json.dumps(values, indent=indent), pipeline=MASKS)
    assert only(census, 'short-polygons').startswith(
        f'3 annotations of {tmp_path}/a.json with fewer than 3 points in a polygon'
    )
    assert census.findings[0].files == tuple(f'{tmp_path}/img/{i}.jpg' for i in (1, 2, 3))


SIX, ODD = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize(
    ('outline', 'read'),
    [
        ([SIX], True),
        ([[-1, 2.5, 3, 4e1, 5, 6], [*SIX, 7, 8]], True),
        *((outline, outline) for outline in ([], [[]], [ODD], [SIX, ODD], [SIX, [1, 2, 3, 4]])),
        *((outline, outline) for outline in (SIX, [SIX, []], dict(size=[1, 6], counts=[6]))),
    ],
)
def test_polygons_that_can_be_used_are_not_read(tmp_path, outline, read, indent):
    values = content([(10, 10, 20, 20, 1)])
    values['annotations'][0].update(segmentation=outline, note='says "segmentation": [[1, 2]]')
    (tmp_path / 'a.json').write_text(json.dumps(values, indent=indent))
    values['annotations'][0]['segmentation'] = read
    del values['annotations'][0]['note']  # which nothing here asks for
    assert read_annotations(str(tmp_path / 'a.json')) == values


def test_a_file_that_begins_with_a_mark(tmp_path):
    """The fast reader takes none with a byte order mark; polygons are read then."""
    values = content([(10, 10, 20, 20, 1), (10, 10, 20, 20, 1)])
    for annotation, outline in zip(values['annotations'], (SIX, [1, 2, 3, 4]), strict=True):
        annotation['segmentation'] = [outline]
    census_of(tmp_path, values)  # writes the pictures
    census = census_of(tmp_path, '\ufeff' + json.dumps(values), pipeline=MASKS)
    assert only(census, 'short-polygons').startswith('1 annotation')


@pytest.mark.parametrize(('values', 'reason'), [
    ('{"images": [', 'is no JSON'),
    ('[]', "has no 'images', 'categories'"),
    (dict(images=[dict(id=1, file_name='x.jpg')], categories=[BALLOON]),
     "has 1 entry of 'images' without 'width'"),
    (dict(images=[dict(id=1, file_name='x.jpg', width=9, height=9)], categories=[BALLOON],
          annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 3, 4])]),
     "without 'area': write width × height of the box"),
])  # fmt: skip
def test_files_that_mmdet_cannot_read(values, reason, tmp_path):
    census = census_of(tmp_path, values, loader='val_dataloader')
    assert reason in census.findings[0].message
    assert census.findings[0].stops


def test_pictures_of_a_test_have_no_annotations(tmp_path):
    values = content([(10, 10, 20, 20, 1)])
    del values['annotations']
    census = census_of(tmp_path, values, loader='test_dataloader', test_mode=True)
    assert not any(finding.stops for finding in census.findings)
    assert census_of(tmp_path, values).findings[0].kind == 'no-annotation'


def test_a_text_instead_of_classes(tmp_path):
    assert only(census_of(tmp_path, content([]), 'balloon'), 'classes-as-text') == (
        "classes of CocoDataset is the text 'balloon', whose letters would be the classes: write "
        "('balloon',), with the comma"
    )


def test_what_the_census_counts_is_what_the_dataset_loads(tmp_path):
    """On odd boxes of every kind, the numbers are those of mmdet's own loading."""
    from mmdet.datasets import CocoDataset

    kite = dict(id=5, name='kite')
    values = content(
        [(10, 10, 20, 20, 1), (90, 70, 30, 30, 5), (-5, 3, 4, 9, 1), (3, 3, 0.5, 3, 1),
         (1, 1, 9, 9, 7), (99.5, 0, 9, 9, 5), (5, 5, 9, 9, 1), (0, 0, 3, 3, 5)],
        (BALLOON, kite, dict(id=7, name='other')),
    )  # fmt: skip
    values['annotations'][6]['iscrowd'] = 1
    values['annotations'][7]['area'] = 0
    settings = dict(filter_cfg=dict(filter_empty_gt=True, min_size=32))
    census = census_of(tmp_path, values, ('balloon', 'kite'), **settings)
    dataset = CocoDataset(
        data_root=str(tmp_path), ann_file='a.json', data_prefix=dict(img='img'),
        metainfo=dict(classes=('balloon', 'kite')), **settings,
    )  # fmt: skip
    labels = [
        instance['bbox_label']
        for index in range(len(dataset))
        for instance in dataset.get_data_info(index)['instances']
        if not instance['ignore_flag']
    ]
    assert [row.amount for row in census.table] == [labels.count(0), labels.count(1)] == [1, 2]
    assert take_census(dataset).table == census.table
