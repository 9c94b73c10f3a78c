"""What the census says of VOC files, each with exact numbers."""

from pathlib import Path

import pytest

from mmslak.datasets.census import Census, Row, take_census

MASKS = [dict(type='mmdet.LoadAnnotations', with_mask=True)]


def write(root: Path, boxes: list[tuple[str, int]], suffix: str = '.jpg') -> Path:
    """A picture for each (class, side of its box)."""
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / 'VOC2007' / folder).mkdir(parents=True, exist_ok=True)
    folder = root / 'VOC2007'
    for i, (name, side) in enumerate(boxes):
        (folder / f'JPEGImages/{i}{suffix}').touch()
        (folder / f'Annotations/{i}.xml').write_text(
            f'<annotation><size><width>{100 + i}</width><height>80</height></size><object>'
            f'<name>{name}</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>'
            f'<xmax>{1 + side}</xmax><ymax>{1 + side}</ymax></bndbox></object></annotation>'
        )
    names = '\n'.join(str(i) for i, _ in enumerate(boxes))
    (folder / 'ImageSets/Main/trainval.txt').write_text(names + '\n')
    return root


def census_of(root: Path, loader: str = '', **settings) -> Census:
    from mmdet.datasets import VOCDataset

    dataset = VOCDataset(
        data_root=str(root), ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007'), lazy_init=True, **settings,
    )  # fmt: skip
    return take_census(dataset, loader=loader)


def only(census: Census, kind: str) -> str:
    (finding,) = census.findings
    assert finding.kind == kind
    return finding.message


def two() -> dict:
    return dict(metainfo=dict(classes=('cat', 'dog')))


def test_objects_and_pictures_are_counted(tmp_path):
    census = census_of(write(tmp_path, [('cat', 50), ('dog', 20), ('cat', 20)]), **two())
    assert census.table == [Row('cat', 2, 2), Row('dog', 1, 1)]
    assert census.sizes == dict(smallest=(100, 80), largest=(102, 80))
    assert (census.pictures, census.empty, census.findings) == (3, 0, [])


def test_a_class_of_ones_own(tmp_path):
    census = census_of(write(tmp_path, [('helmet', 50)] * 8), filter_cfg=dict(filter_empty_gt=True))
    assert only(census, 'no-class-known') == (
        f"the classes of {tmp_path}/VOC2007/Annotations are 'helmet' (8 objects), none of which "
        "VOCDataset looks for (its classes are 'aeroplane', 'bicycle', 'bird' and 17 more): set "
        "metainfo=dict(classes=('helmet',)) of the dataset, and num_classes=1 of the heads"
    )
    assert census.findings[0].stops


def test_what_mmdet_does_not_read_may_be_of_any_form(tmp_path):
    root = write(tmp_path, [('cat', 50), ('dog', 50), ('line', 9)])
    file = root / 'VOC2007/Annotations/2.xml'
    file.write_text(file.read_text().replace('bndbox', 'polyline'))
    census = census_of(root, **two())
    assert "VOCDataset does not look for 'line'" in only(census, 'class-not-looked-for')


def test_a_name_that_differs(tmp_path):
    census = census_of(write(tmp_path, [('Cat', 50), ('dog', 50)]), **two())
    assert "class 'Cat' of" in only(census, 'class-name-differs')


def test_small_boxes_that_the_stock_base_leaves_out(tmp_path):
    root = write(tmp_path, [('cat', 50), ('dog', 40), ('cat', 20)])
    settings = dict(filter_cfg=dict(bbox_min_size=32))
    census = census_of(root, **settings, **two())
    assert only(census, 'annotations-left-out') == (
        f'of 3 boxes in {root}/VOC2007/Annotations 2 are left; left out: 1 box below 32 '
        'pixels (bbox_min_size=32)'
    )
    census = census_of(write(tmp_path, [('cat', 20)]), **settings, **two())
    assert only(census, 'no-annotation').endswith('1 box below 32 pixels (bbox_min_size=32)')
    assert census_of(root, **two()).dropped == {}


def test_masks(tmp_path):
    census = census_of(write(tmp_path, [('cat', 50), ('dog', 9)]), pipeline=MASKS, **two())
    assert '2 of 2 annotations in' in only(census, 'no-polygons')
    assert census.findings[0].stops


def test_pictures_of_another_suffix(tmp_path):
    root = write(tmp_path, [('cat', 50), ('dog', 50)], suffix='.JPG')
    assert only(census_of(root, **two()), 'pictures-absent').endswith(
        f'/JPEGImages: 0.jpg, 1.jpg; there is {root}/VOC2007/JPEGImages/0.JPG, and mmdet looks for '
        "'.jpg'"
    )


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader'])
def test_absent_and_broken_files_stop(loader, tmp_path):
    root = write(tmp_path, [('cat', 50), ('dog', 50), ('dog', 50)])
    (root / 'VOC2007/Annotations/0.xml').unlink()
    (root / 'VOC2007/Annotations/1.xml').write_text('<annotation>')
    stops = {f.kind: f.count for f in census_of(root, loader, **two()).findings if f.stops}
    assert stops == {'annotations-absent': 1, 'annotations-unreadable': 1}
