"""Pictures that two splits share, by their content."""

import os
from types import SimpleNamespace

import pytest

from mmslak.datasets import shared_pictures as module
from mmslak.datasets.shared_pictures import (
    HEAD,
    picture_paths,
    shared_finding,
    shared_pictures,
)


@pytest.fixture
def write(tmp_path):
    """Writes a file, and gives its path."""

    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return write


def test_the_same_content_under_another_name(write):
    train = [write('train/a.jpg', b'one'), write('train/b.jpg', b'two'), write('train/c.JPG', b'3')]
    val = [write('val/0.jpg', b'two'), write('val/1.jpg', b'six'), write('val/b.jpg', b'four')]
    assert shared_pictures(train, val) == [(train[1], val[0])]
    assert shared_pictures(train[:1], val) == []


def test_a_difference_after_the_head_is_seen(write):
    head = bytes(HEAD)
    train = [write('train/0.bmp', head + b'x' * 9)]
    val = [write('val/0.bmp', head + b'x' * 8 + b'y'), write('val/1.bmp', head + b'x' * 9)]
    assert shared_pictures(train, val) == [(train[0], val[1])]


def test_several_copies_count_once_for_each_of_val(write):
    train = [write('train/0.jpg', b'same'), write('train/1.jpg', b'same')]
    val = [write('val/0.jpg', b'same'), write('val/1.jpg', b'same')]
    assert shared_pictures(train, [*val, val[0]]) == [(train[0], val[0]), (train[0], val[1])]
    assert shared_pictures(train, val, at_most=1) == [(train[0], val[0])]


def test_files_of_both_lists_and_links_to_them_are_not_read(write, tmp_path, monkeypatch):
    path, alone = write('all/0.jpg', b'same'), write('all/1.jpg', b'other one')
    link = str(tmp_path / 'link.jpg')
    os.symlink(path, link)
    monkeypatch.setattr(module, '_digest', lambda *_: pytest.fail('a file was read'))
    assert shared_pictures([path, alone], [link]) == [(path, link)]
    assert shared_pictures([path, alone], [path, alone]) == [(path, path), (alone, alone)]


def test_only_files_of_one_size_are_read(write, monkeypatch):
    read, digest = [], module._digest
    monkeypatch.setattr(module, '_digest', lambda *a: read.append(a[0]) or digest(*a))
    train = [write('train/0.jpg', b'1'), write('train/1.jpg', b'22')]
    val = [write('val/0.jpg', b'33'), write('val/1.jpg', b'4444')]
    assert shared_pictures(train, val) == []
    assert read == [val[0], train[1]]  # their beginnings, which differ


def test_what_is_absent_or_empty_is_passed_over(write, tmp_path):
    absent = str(tmp_path / 'absent.jpg')
    train = [write('train/0.jpg', b''), absent, write('train/1.jpg', b'one')]
    assert shared_pictures(train, [write('val/0.jpg', b''), absent]) == []
    assert shared_pictures([], train) == []


def test_the_finding_names_both_files(write):
    train = [write('train/a.jpg', b'one'), write('train/b.jpg', b'two')]
    val = [write('val/0.jpg', b'two'), write('val/1.jpg', b'six')]
    found = shared_finding(train, val)
    assert found.message.startswith(
        f'1 of 2 pictures is in train_dataloader, too, such as {val[0]}, which is {train[1]}: '
    )
    assert (found.kind, found.loader, found.stops) == ('shared-pictures', 'val_dataloader', False)
    assert (found.files, found.count) == ((val[0],), 1)
    both = shared_finding(train, train, 'test_dataloader').message
    assert both.startswith(f'2 of 2 pictures are in train_dataloader, too, such as {train[0]}: ')
    assert shared_finding(train, val[1:]) is None


def test_the_pictures_of_a_dataset_inside_of_wrappers():
    class Dataset:
        pipeline = None

        def __len__(self):
            return 2

        def get_data_info(self, index):
            return [dict(img_path='a.jpg'), dict(img_id=3)][index]

    assert picture_paths(SimpleNamespace(datasets=[Dataset(), Dataset()])) == ['a.jpg', 'a.jpg']
