"""Downloads from a server that breaks off."""

import hashlib
import random
import resource
import sys
import time
import types
from pathlib import Path

import pytest

from mmslak.fileio import download
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


def test_a_server_that_cannot_resume_sends_all_again(server, target):
    server.ranges = False
    server.faults = [300_000]
    fetch(server.url('data.bin'), target)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, 'bytes=300000-']


def test_a_server_that_cannot_resume_and_always_breaks_off_is_given_up(server, target):
    server.ranges = False
    server.faults = [300_000] * 20
    with pytest.raises(DownloadError, match='broke off'):
        fetch(server.url('data.bin'), target)
    assert len(server.asked) == 2 + RETRIES


def test_a_file_that_has_changed_meanwhile_is_not_mixed_with_the_old_one(server, target):
    server.faults = [300_000]
    original, other = CONTENT, CONTENT[::-1]

    class ChangesAfterTheFirst(dict):
        def get(self, key):
            if server.asked:
                server.modified = time.time() + 60
            return other if server.asked else original

    server.files = ChangesAfterTheFirst()
    fetch(server.url('data.bin'), target)
    assert target.read_bytes() == other
    assert server.asked == [None, 'bytes=300000-', None]


def test_a_file_that_always_changes_is_given_up(server, target):
    server.modified = time.time() + 60
    server.faults = [300_000, None] * 20
    with pytest.raises(DownloadError, match='check the connection'):
        fetch(server.url('data.bin'), target)
    assert len(server.asked) == 2 + RETRIES


@pytest.mark.parametrize(
    ('extra', 'asked'), [(b'', ['bytes=1000000-']), (b'x', ['bytes=1000001-', None])]
)
def test_a_part_with_nothing_left_to_fetch(server, target, extra, asked):
    target.parent.mkdir()
    target.with_name('data.bin.part').write_bytes(CONTENT + extra)
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


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DownloadError, match=r'data.bin.part cannot be written: Not a directory'):
        fetch(server.url('data.bin'), tmp_path / 'file' / 'new' / 'data.bin')
    assert server.asked == []


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
