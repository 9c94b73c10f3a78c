"""Archives that must not be unpacked, and those that may."""

import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmslak.fileio.archive import ArchiveError, unpack

FILES = {'top/a/1.txt': b'one' * 1000, 'top/a/2.txt': b'', 'top/b.txt': b'b', 'other.txt': b'o'}


def tar_with(
    path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], mode: str = 'w'
) -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            content = b''
            if isinstance(member, tuple):
                name, content = member
                member = tarfile.TarInfo(name)
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def zip_with(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def packed(path: Path) -> Path:
    """An archive of FILES; the suffix says which kind."""
    if path.suffix == '.zip':
        return zip_with(path, list(FILES.items()))
    return tar_with(path, list(FILES.items()), 'w:gz' if path.suffix == '.tgz' else 'w')


def tree(folder: Path) -> dict[str, bytes]:
    """Files below a folder by their path."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tgz'])
def test_unpack(tmp_path, name, capsys):
    assert unpack(packed(tmp_path / name), tmp_path / 'out') == 4
    assert tree(tmp_path / 'out') == FILES
    assert f'unpacking {name}' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
def test_unpack_what_is_inside_a_folder_over_what_is_there(tmp_path, name):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'b.txt').write_bytes(b'half')
    (out / 'mine.txt').write_bytes(b'mine')
    assert unpack(packed(tmp_path / name), out, inside='top', progress=False) == 3
    inside = {k.removeprefix('top/'): v for k, v in FILES.items() if k.startswith('top/')}
    assert tree(out) == {**inside, 'mine.txt': b'mine'}
    with pytest.raises(ArchiveError, match='no files in it below nothing'):
        unpack(tmp_path / name, out, inside='nothing')


@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
@pytest.mark.parametrize(
    'evil',
    ['../evil', '/evil', 'a/../../evil', 'top/../../evil', '..\\evil', 'C:\\evil', 'C:/evil'],
)
def test_a_path_out_of_the_folder_is_refused_before_anything_is_written(tmp_path, name, evil):
    members = [('good.txt', b'good'), (evil, b'evil')]
    archive = (zip_with if name == 'a.zip' else tar_with)(tmp_path / name, members)
    out = tmp_path / 'deep' / 'out'
    with pytest.raises(ArchiveError, match=r'refused, .*evil would be written outside of'):
        unpack(archive, out)
    assert tree(tmp_path).keys() == {name}


@pytest.mark.parametrize(
    'kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_of_tar_archives_are_refused(tmp_path, kind):
    link = tarfile.TarInfo('link')
    link.type, link.linkname = kind, '../outside'
    archive = tar_with(tmp_path / 'a.tar', [('good.txt', b''), link, ('link/evil', b'evil')])
    with pytest.raises(ArchiveError, match='refused, link is a link or a device'):
        unpack(archive, tmp_path / 'out')
    assert tree(tmp_path).keys() == {'a.tar'}


def test_links_of_zip_archives_are_refused(tmp_path):
    link = zipfile.ZipInfo('link')
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zip_with(tmp_path / 'a.zip', [(link, b'../outside'), ('link/evil', b'evil')])
    with pytest.raises(ArchiveError, match='refused, link is a link'):
        unpack(archive, tmp_path / 'out')
    assert tree(tmp_path).keys() == {'a.zip'}


def test_a_zip_that_lies_about_its_size_gets_no_more_than_it_said(tmp_path):
    archive = zip_with(tmp_path / 'a.zip', [('bomb', bytes(1_000_000))])
    archive.write_bytes(
        archive.read_bytes().replace((1_000_000).to_bytes(4, 'little'), (10).to_bytes(4, 'little'))
    )
    with pytest.raises(ArchiveError, match='damaged'):
        unpack(archive, tmp_path / 'out')
    assert sum(map(len, tree(tmp_path / 'out').values())) <= 10


def broken(path: Path, how: str) -> Path:
    content = bytearray(packed(path).read_bytes())
    if how == 'cut':
        del content[len(content) // 2 :]
    elif how == 'empty':
        content = b''
    elif how == 'text':
        content = b'<html>Sorry</html>' * 100
    elif how == 'flipped':
        content[45] ^= 0xFF
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ('name', 'how'),
    [(n, h) for n in ('a.zip', 'a.tgz', 'a.tar') for h in ('cut', 'empty', 'text', 'flipped')],
)
def test_a_damaged_archive_is_one_clear_error(tmp_path, name, how):
    archive = broken(tmp_path / name, how)
    with pytest.raises(ArchiveError, match=r'a\.\w+.*(damaged|cannot be unpacked)'):
        unpack(archive, tmp_path / 'out')


def test_an_encrypted_zip_is_refused(tmp_path):
    archive = packed(tmp_path / 'a.zip')
    content = archive.read_bytes()
    archive.write_bytes(
        content.replace(b'PK\x01\x02\x14\x03\x14\0\0\0', b'PK\x01\x02\x14\x03\x14\0\1\0')
    )
    assert archive.read_bytes() != content
    with pytest.raises(ArchiveError, match='encrypted'):
        unpack(archive, tmp_path / 'out')


def test_a_missing_archive_or_an_unwritable_folder_is_one_clear_error(tmp_path):
    with pytest.raises(ArchiveError, match='No such file'):
        unpack(tmp_path / 'no.zip', tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ArchiveError, match='cannot be unpacked into'):
        unpack(packed(tmp_path / 'a.zip'), tmp_path / 'file' / 'out')


@pytest.mark.parametrize('name', ['a.zip', 'a.tgz', 'a.tar'])
def test_random_damage_never_escapes(tmp_path, name):
    rng = random.Random(name)
    good = packed(tmp_path / name).read_bytes()
    refused = 0
    for case in range(150):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / name).write_bytes(content)
        try:
            unpack(folder / name, folder / 'out', progress=False)
        except ArchiveError:
            refused += 1
        assert {path.name for path in folder.iterdir()} <= {name, 'out'}
    assert refused > 30
