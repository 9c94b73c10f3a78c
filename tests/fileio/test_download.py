"""Downloads from a server that breaks off, and archives that must not be unpacked."""

import hashlib
import io
import random
import resource
import shutil
import stat
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

from mmslak.fileio import download
from mmslak.fileio.archive import ArchiveError, unpack
from mmslak.fileio.download import RETRIES, DownloadError, fetch, fetch_google_drive
from tests import file_server

CONTENT = random.Random(0).randbytes(1_000_000)
MD5 = f'md5:{hashlib.md5(CONTENT).hexdigest()}'
SHA256 = f'sha256:{hashlib.sha256(CONTENT).hexdigest()}'


@pytest.fixture
def server():
    with file_server.running() as server:
        server.files['/data.bin'] = CONTENT
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, 'WAIT', 0.0)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / 'new' / 'data.bin'


def beside(target: Path) -> list[str]:
    """What lies in a file's folder."""
    return sorted(path.name for path in target.parent.iterdir())


# ---------------------------------------------------------------- fetch


@pytest.mark.parametrize('checksum', [None, MD5, SHA256])
def test_fetch(server, target, checksum, capsys):
    assert fetch(server.url('data.bin'), target, checksum) == target
    assert target.read_bytes() == CONTENT
    assert beside(target) == ['data.bin']
    assert 'data.bin' in capsys.readouterr().err  # the progress bar


def test_no_progress_bar_where_none_is_wanted(server, target, capsys):
    fetch(server.url('data.bin'), target, progress=False)
    assert capsys.readouterr() == ('', '')


def test_a_broken_connection_is_taken_up_where_it_broke(server, target):
    server.faults = [300_000, 200_000]
    fetch(server.url('data.bin'), target, MD5)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, 'bytes=300000-', 'bytes=500000-']
    assert beside(target) == ['data.bin']


def test_a_stalled_connection_is_taken_up(server, target, monkeypatch):
    monkeypatch.setattr(download, 'TIMEOUT', 0.3)
    server.faults = ['stall']
    fetch(server.url('data.bin'), target, MD5)
    assert len(server.asked) == 2
    assert target.read_bytes() == CONTENT


def test_the_next_call_goes_on_after_giving_up(server, target, monkeypatch):
    monkeypatch.setattr(download, 'RETRIES', 2)
    server.faults = [300_000, 0, 0, 0]
    with pytest.raises(
        DownloadError, match=r'broke off.*300,000 bytes are kept in .*data.bin.part'
    ):
        fetch(server.url('data.bin'), target, MD5)
    assert not target.exists()
    assert len(server.asked) == 4
    fetch(server.url('data.bin'), target, MD5)
    assert server.asked[4:] == ['bytes=300000-']
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize('missing', ['ranges', 'etag', 'strong etag'])
def test_a_server_that_cannot_resume_sends_all_again(server, target, missing):
    if missing == 'strong etag':
        server.weak = True
    else:
        setattr(server, missing, False)
    server.faults = [300_000]
    fetch(server.url('data.bin'), target)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, 'bytes=300000-' if missing == 'ranges' else None]


def test_a_server_that_cannot_resume_and_always_breaks_off_is_given_up(server, target):
    server.ranges = False
    server.faults = [300_000] * 20
    with pytest.raises(DownloadError, match='broke off'):
        fetch(server.url('data.bin'), target)
    assert len(server.asked) == 2 + RETRIES


def test_a_file_that_has_changed_meanwhile_is_not_mixed_with_the_old_one(server, target):
    server.faults = [300_000]
    other = CONTENT[::-1]
    original = server.files['/data.bin']

    class ChangesAfterTheFirst(dict):
        def get(self, key):
            return original if not server.asked else other

    server.files = ChangesAfterTheFirst()
    fetch(server.url('data.bin'), target)
    assert target.read_bytes() == other


@pytest.mark.parametrize(
    ('extra', 'asked'), [(b'', ['bytes=1000000-']), (b'x', ['bytes=1000001-', None])]
)
def test_a_part_with_nothing_left_to_fetch(server, target, extra, asked):
    target.parent.mkdir()
    target.with_name('data.bin.part').write_bytes(CONTENT + extra)
    target.with_name('data.bin.part.tag').write_text(f'"{MD5[4:]}"')
    fetch(server.url('data.bin'), target)
    assert target.read_bytes() == CONTENT
    assert server.asked == asked
    assert beside(target) == ['data.bin']


def test_a_wrong_checksum_is_an_error_and_a_retry_starts_anew(server, target):
    server.files['/data.bin'] = CONTENT[:-1] + b'!'
    got = hashlib.md5(server.files['/data.bin']).hexdigest()
    with pytest.raises(DownloadError) as error:
        fetch(server.url('data.bin'), target, MD5)
    for part in (str(target), f'expected {MD5[4:]}', f'got {got}', 'data.bin.corrupt'):
        assert part in str(error.value)
    assert beside(target) == ['data.bin.corrupt']
    server.files['/data.bin'] = CONTENT
    fetch(server.url('data.bin'), target, MD5)
    assert server.asked == [None, None]
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_there_is_verified_and_not_fetched(server, target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    fetch(server.url('data.bin'), target, SHA256)
    target.write_bytes(CONTENT[1:])
    with pytest.raises(DownloadError, match='expected'):
        fetch(server.url('data.bin'), target, SHA256)
    assert beside(target) == ['data.bin.corrupt']
    assert server.asked == []


@pytest.mark.parametrize(
    ('name', 'fault', 'message'), [('no.bin', None, '404'), ('data.bin', 403, '403')]
)
def test_what_the_server_does_not_give_is_not_asked_for_twice(server, target, name, fault, message):
    server.faults = [fault]
    with pytest.raises(DownloadError, match=f'{name}: {message}'):
        fetch(server.url(name), target)
    assert len(server.asked) == 1
    assert beside(target) == []


def test_a_busy_server_is_asked_again(server, target):
    server.faults = [503, 503]
    fetch(server.url('data.bin'), target)
    assert len(server.asked) == 3
    assert target.read_bytes() == CONTENT


def test_a_login_page_is_not_taken_for_the_file(server, target):
    server.content_type = 'text/html; charset=utf-8'
    with pytest.raises(DownloadError, match='a web page came in place of the file'):
        fetch(server.url('data.bin'), target)
    assert beside(target) == []


def test_no_network(target):
    with file_server.running() as server:
        url = server.url('data.bin')
    with pytest.raises(DownloadError, match=r'refused.*check the connection'):
        fetch(url, target)


def test_other_addresses_are_refused(tmp_path):
    (tmp_path / 'secret').write_text('x')
    with pytest.raises(DownloadError, match='http'):
        fetch((tmp_path / 'secret').as_uri(), tmp_path / 'copy')


def test_a_disk_that_is_too_small_is_told_beforehand(server, target, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=999_999))
    with pytest.raises(DownloadError, match='1,000,000 bytes wanted, 999,999 free'):
        fetch(server.url('data.bin'), target)
    assert beside(target) == []


def test_a_disk_that_fills_up(server, target):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r'data.bin.part cannot be written: File too large'):
            fetch(server.url('data.bin'), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fetch(server.url('data.bin'), target, MD5)
    assert server.asked == [None, 'bytes=300000-']


# ---------------------------------------------------------------- Google Drive


def test_google_drive_without_gdown(target, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(DownloadError, match=r'file/d/ID is on Google Drive.*pip install gdown'):
        fetch_google_drive('ID', target)


def test_google_drive(target, monkeypatch):
    calls = []

    def gdown_download(*, id: str, output: str, quiet: bool, resume: bool) -> str:
        calls.append((id, quiet, resume))
        Path(output).write_bytes(CONTENT)
        return output

    monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=gdown_download))
    assert fetch_google_drive('ID', target) == target
    assert fetch_google_drive('ID', target) == target
    assert calls == [('ID', False, True)]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize('error', [OSError('too many\n accesses'), None])
def test_google_drive_that_refuses(target, monkeypatch, error):
    def gdown_download(**options):
        if error:
            raise error

    monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=gdown_download))
    with pytest.raises(DownloadError, match='too many accesses' if error else 'could not'):
        fetch_google_drive('ID', target)


# ---------------------------------------------------------------- unpack

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


@pytest.mark.parametrize('name', ['a.zip', 'a.tar'])
def test_an_archive_larger_than_the_free_space_is_refused(tmp_path, name, monkeypatch):
    size = sum(map(len, FILES.values()))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=size - 1))
    with pytest.raises(ArchiveError, match=f'{size:,} bytes when unpacked, but only {size - 1:,}'):
        unpack(packed(tmp_path / name), tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=size))
    assert unpack(tmp_path / name, tmp_path / 'out') == 4


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
