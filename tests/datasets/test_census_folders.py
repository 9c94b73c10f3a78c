"""What the census says of folders of classes and lists of files."""

from pathlib import Path

import pytest

from mmslak.datasets.census import Census, Row, take_census


def write(root: Path, counts: dict[str, int], suffix: str = '.jpg') -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f'{i}{suffix}').touch()
    return root


def census_of(root: Path, classes: tuple[str, ...] | None = None, kind: str = '', **settings):
    from mmpretrain.datasets import CustomDataset, ImageNet

    metainfo = dict(classes=classes) if classes else None
    dataset = (ImageNet if kind else CustomDataset)(
        data_prefix=str(root), metainfo=metainfo, lazy_init=True, **settings
    )
    return take_census(dataset)


def only(census: Census, kind: str, stops: bool) -> str:
    (finding,) = census.findings
    assert (finding.kind, finding.stops) == (kind, stops)
    return finding.message


def test_pictures_of_folders(tmp_path):
    write(tmp_path, {'cat': 2, 'dog': 3, '.hidden': 1})
    (tmp_path / 'cat/._0.jpg').touch()
    census = census_of(tmp_path)
    assert census.table == [Row('cat', 2, 2), Row('dog', 3, 3)]
    assert (census.pictures, census.unit, census.names) == (5, 'pictures', ['cat', 'dog'])
    assert census.findings == []


def test_a_class_without_pictures(tmp_path):
    census = census_of(write(tmp_path, {'cat': 2, 'dog': 0}))
    assert only(census, 'class-never-occurs', False).startswith("class 'dog' never occurs in 2")


def test_no_picture_with_the_suffix(tmp_path):
    census = census_of(write(tmp_path, {'cat': 2, 'dog': 1}, suffix='.webp'))
    assert only(census, 'no-picture', True).endswith(
        "; 3 of 3 files end in '.webp': set extensions=('.webp',) of the dataset"
    )


def test_pictures_without_labels_have_no_classes(tmp_path):
    (tmp_path / 'x.jpg').touch()
    assert census_of(tmp_path, with_label=False) == Census()


def test_no_folder(tmp_path):
    (tmp_path / 'x.jpg').touch()
    assert only(census_of(tmp_path), 'no-picture', True) == (
        f'{tmp_path} has no folder: each class is a folder of pictures in it'
    )


def test_folders_of_ones_own_under_the_classes_of_imagenet(tmp_path):
    census = census_of(write(tmp_path, {'cat': 2, 'dog': 1}), kind='ImageNet')
    message = only(census, 'class-folders', True)
    assert f"{tmp_path} has 2 folders ('cat', 'dog') for 1000 classes" in message
    assert "set metainfo=dict(classes=('cat', 'dog')) of the dataset and num_classes=2" in message


def test_classes_in_another_order_than_folders(tmp_path):
    census = census_of(write(tmp_path, {'cat': 2, 'dog': 1}), ('dog', 'cat'))
    assert only(census, 'class-order', False) == (
        "classes are numbered in the order of their folders: number 0 is 'cat', and 'dog' in the "
        "classes of the dataset: leave classes out, or write ('cat', 'dog')"
    )


@pytest.mark.parametrize(('lines', 'kind', 'stops', 'said'), [
    (['cat/0.jpg 1', 'dog/0.jpg 2'], 'label-values', False, 'counted from 1: subtract 1'),
    (['cat/0.jpg', 'dog/0.jpg 1'], 'annotations-unreadable', True, "such as 'cat/0.jpg'"),
    (['cat/0.jpg 0', 'dog/9.jpg 1'], 'pictures-absent', False, ': dog/9.jpg'),
    ([], 'no-picture', True, 'list.txt lists no picture'),
])  # fmt: skip
def test_lists_of_files(lines, kind, stops, said, tmp_path):
    write(tmp_path, {'cat': 1, 'dog': 1})
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    census = census_of(tmp_path, ('cat', 'dog'), ann_file=str(tmp_path / 'list.txt'))
    (finding,) = [f for f in census.findings if f.kind == kind]
    assert finding.stops == stops
    assert said in finding.message
