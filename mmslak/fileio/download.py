"""Files from the net: resumed where they broke off, and verified."""

import contextlib
import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mmslak.errors import UserError

CHUNK = 1 << 18  # bytes
RETRIES = 4  # in a row without a byte received
WAIT = 2.0  # seconds before a retry
TIMEOUT = 30.0  # seconds without a byte


class DownloadError(UserError):
    """A file that cannot be had; the message says why and what to do."""


def fetch(url: str, target: str | Path, checksum: str | None = None, progress: bool = True) -> Path:
    """Downloads a file, or what is still missing of it.

    It is written to `NAME.part` and gets its name when it is whole. A broken connection is taken up
    again by itself, and by the next call after that was given up, where the server can do so and
    still has the same file; else the download starts anew.

    Args:
        url: An http or https address.
        target: The file to write. If it is there already, it is only verified.
        checksum: 'md5:…' or 'sha256:…' in hexadecimal digits; None verifies the size alone.
        progress: Show a progress bar.

    Returns:
        target

    Raises:
        DownloadError: If the file is not there, cannot be reached, written or is not the right one.
            One with another checksum is moved to `NAME.corrupt`, so that a retry starts anew.
    """
    target = Path(target)
    part = target.with_name(f'{target.name}.part')
    if not re.match('https?://', url):
        raise DownloadError(f'{url}: expected an address that begins with http:// or https://')
    if target.is_file():
        _verify(target, checksum, url)
        return target
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures > RETRIES:
                reason = str(error).strip('<>') or type(error).__name__
                kept = f'{_size(part):,} bytes are kept in {part}; ' if _size(part) else ''
                raise DownloadError(
                    f'{url}: {reason}; {kept}check the connection and run the command again'
                ) from error
            time.sleep(WAIT)
    _verify(part, checksum, url)
    with _writing(target):
        part.replace(target)
        _tag(part).unlink(missing_ok=True)
    return target


def fetch_google_drive(file_id: str, target: str | Path, progress: bool = True) -> Path:
    """Downloads a shared file of Google Drive with gdown, which resumes as `fetch` does.

    Raises:
        DownloadError: If gdown is not installed, or Google does not give the file.
    """
    target = Path(target)
    page = f'https://drive.google.com/file/d/{file_id}'
    if target.is_file():
        return target
    try:
        import gdown
    except ImportError as error:
        raise DownloadError(
            f'{page} is on Google Drive, which takes gdown to download: pip install gdown'
        ) from error
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        gdown.download(id=file_id, output=str(target), quiet=not progress, resume=True)
    except Exception as error:  # its own, those of requests, of the file system
        raise DownloadError(f'{page}: {" ".join(str(error).split())}') from error
    if not target.is_file():  # older versions of gdown print the reason and return
        raise DownloadError(f'{page}: gdown could not download it')
    return target


def _receive(url: str, part: Path, progress: bool) -> None:
    """One request: appends what is missing of `part`, or writes it anew."""
    have = _size(part) if _tag(part).is_file() else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'mmslak'})
    if have:
        request.add_header('Range', f'bytes={have}-')
        # Of a file that has changed since, the server sends all and not the rest.
        request.add_header('If-Range', _tag(part).read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # nothing is left to send
                if error.headers.get('Content-Range') == f'bytes */{have}':
                    return
                part.unlink(missing_ok=True)
                raise ConnectionError('the server has another file now') from error
            if error.code < 500:
                raise DownloadError(f'{url}: {error.code} {error.reason}') from error
        raise
    with response:
        start = re.match(r'bytes (\d+)-', response.headers.get('Content-Range', ''))
        resumed = response.status == 206
        if resumed and (not start or int(start[1]) != have):
            part.unlink()
            raise ConnectionError('the server sent another part than asked for')
        if response.headers.get_content_type() == 'text/html':
            raise DownloadError(
                f'{url}: a web page came in place of the file; it has moved or needs a login'
            )
        have = have if resumed else 0
        length = response.headers.get('Content-Length')
        total = have + int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if total and free < total - have:
            raise DownloadError(
                f'{part.parent}: the disk is too full for {url}: '
                f'{total - have:,} bytes wanted, {free:,} free'
            )
        if not resumed:
            _write_tag(part, response.headers)
        with (
            _open(part, 'ab' if resumed else 'wb') as file,
            progress_bar(part.stem, total, have, progress) as advance,
        ):
            while chunk := response.read(CHUNK):
                rest = memoryview(chunk)
                with _writing(part):
                    while rest:
                        rest = rest[file.write(rest) :]
                advance(len(chunk))
    if total is not None and _size(part) != total:
        if _size(part) > total:  # two downloads at once have written to it
            part.unlink()
        raise ConnectionError(f'the connection broke off, {total:,} bytes expected')


def _write_tag(part: Path, headers: http.client.HTTPMessage) -> None:
    """Keeps by what the server tells one version of the file from another.

    Without that, there is nothing to say that a rest belongs to what is here: no resuming.
    """
    tag = headers.get('ETag', '')
    if not tag.startswith('"'):  # none, or a weak one, which does not stand for the same bytes
        tag = headers.get('Last-Modified', '')
    with _writing(part):
        part.unlink(missing_ok=True)
        _tag(part).unlink(missing_ok=True)
        if tag and headers.get('Accept-Ranges') != 'none':
            _tag(part).write_text(tag)


def _tag(part: Path) -> Path:
    return part.with_name(f'{part.name}.tag')


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _open(path: Path, mode: str) -> BinaryIO:
    """Opens a file without a buffer: a full disk shows where it is written to."""
    with _writing(path):
        return path.open(mode, buffering=0)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tells an error of the disk from one of the net."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f'{path} cannot be written: {error.strerror or error}; '
            'make room or choose another folder, then run the command again'
        ) from error


def _verify(path: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(':')
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open('rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() == expected:
        return
    name = path.name.removesuffix('.part')
    aside = path.with_name(f'{name}.corrupt')
    with _writing(aside):
        path.replace(aside)
        _tag(path).unlink(missing_ok=True)
    raise DownloadError(
        f'{path.with_name(name)}: {kind} of {url} expected {expected}, got {digest.hexdigest()}; '
        f'the file is now {aside}; run the command again to download it anew'
    )


@contextlib.contextmanager
def progress_bar(
    text: str, total: int | None, done: int, progress: bool
) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes on stderr; gives a function that moves it on."""
    with Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    ) as bar:
        task = bar.add_task(text, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
