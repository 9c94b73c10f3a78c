"""The files in folders, and those that are named and absent."""

from pathlib import Path

import pytest

from mmslak.datasets.folders import absent_pictures, files_below, names_below, read_once


@pytest.fixture(autouse=True)
def anew():
    with read_once():
        yield


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def test_files_are_in_order_without_hidden_ones_and_dead_links(tmp_path):
    root = touch(tmp_path, 'b.jpg', 'a.jpg', '._a.jpg', 'deep/er/c.png', '.hidden/d.png')
    (tmp_path / 'dead.jpg').symlink_to(tmp_path / 'nothing.jpg')
    (tmp_path / 'itself.jpg').symlink_to(tmp_path / 'itself.jpg')
    (tmp_path / 'alive.jpg').symlink_to(tmp_path / 'b.jpg')
    assert dict(files_below(root)) == {
        root: ('a.jpg', 'alive.jpg', 'b.jpg'),
        f'{root}/.hidden': ('d.png',),
        f'{root}/deep': (),
        f'{root}/deep/er': ('c.png',),
    }
    assert names_below(f'{root}/deep/') == ['er/c.png']
    assert files_below(f'{root}/nowhere') == ()


def test_links_are_followed_unless_they_lead_back(tmp_path):
    root = touch(tmp_path / 'data', 'train/a.jpg')
    (tmp_path / 'data/val').symlink_to(tmp_path / 'data/train')
    (tmp_path / 'data/train/up').symlink_to(tmp_path / 'data')
    assert sorted(names_below(root)) == ['train/a.jpg', 'val/a.jpg']


def test_a_folder_is_read_once(tmp_path):
    root = touch(tmp_path, 'a.jpg')
    assert names_below(root) == ['a.jpg']
    touch(tmp_path, 'b.jpg')
    assert names_below(root) == ['a.jpg']
    with read_once():
        assert names_below(root) == ['a.jpg', 'b.jpg']


@pytest.mark.parametrize(
    ('listed', 'said', 'stops'),
    [
        (['a.jpg', 'x/b.jpg'], None, False),
        (['./a.jpg', 'x/../x/b.jpg'], None, False),
        (['a.jpg', 'c.jpg', 'd.jpg'], '2 of 3 … {}: c.jpg, d.jpg', 0),
        (['A.jpg', 'x/b.jpg'], '1 of 2 … {}: A.jpg; there is {}/a.jpg, and it looks for .jpg', 0),
        (['b.jpg', 'a.jpg'], '1 of 2 … {}: b.jpg', 0),  # x/b.jpg is another one
        (['e.jpg', 'a.jpg'], '1 of 2 … {}: e.jpg; there is {}/e.PNG, and it looks for .jpg', 0),
        (['n.jpg', 'a.jpg'], '1 of 2 … {}: n.jpg', 0),  # n.txt is no picture
        (
            ['c', 'd', 'f', 'g'],
            '4 of 4 … {}: c, d, f and 1 more; data_prefix is to be the folder from which the list '
            'leads to its pictures',
            True,
        ),
    ],
)  # fmt: skip
def test_pictures_that_are_absent(tmp_path, listed, said, stops):
    root = touch(tmp_path, 'a.jpg', 'x/b.jpg', 'e.PNG', 'n.txt')
    paths = [f'{root}/{name}' for name in listed]
    found = absent_pictures(paths, root, 'l.txt', 'it looks for .jpg')
    if said is None:
        assert found == []
        return
    (finding,) = found
    expected = said.replace('…', 'pictures that l.txt lists are not in').replace('{}', root)
    assert (finding.message, finding.kind) == (expected, 'pictures-absent')
    assert finding.stops == stops
    assert finding.count == int(said[0])
    assert all(not Path(file).exists() for file in finding.files)
