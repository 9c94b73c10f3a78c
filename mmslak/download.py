"""Files from the net: resumed where they broke off, verified, unpacked inside their folder only."""

import contextlib
import hashlib
import http.client
import lzma
import re
import shutil
import stat
import struct
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
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

CHUNK = 1 << 18  # bytes
RETRIES = 4  # in a row without a byte received
WAIT = 2.0  # seconds before a retry
TIMEOUT = 30.0  # seconds without a byte
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    RuntimeError,
    ValueError,
)


class DownloadError(Exception):
    """A file that cannot be had; the message says why and what to do."""


class ArchiveError(Exception):
    """An archive that cannot be unpacked, or must not be."""


# ---------------------------------------------------------------- download


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
            _bar(part.stem, total, have, progress) as advance,
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
def _bar(
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


# ---------------------------------------------------------------- archives


def unpack(archive: str | Path, folder: str | Path, inside: str = '', progress: bool = True) -> int:
    """Unpacks a zip or tar archive into a folder.

    Everything is checked before the first file is written: an archive with a path that leads out of
    the folder, a link or a device is refused whole, and so is one larger than the free space.

    Args:
        archive: The archive, also compressed.
        folder: Where to; made if it is missing.
        inside: Folder of the archive whose content is wanted, without that folder itself; '' is
            all.
        progress: Show a progress bar.

    Returns:
        Number of files written.

    Raises:
        ArchiveError: If the archive is damaged, dangerous, too large or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        # A tar archive may end in a zip file, but not the other way round.
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                return _unpack(_tar_files(tar), archive, folder, inside, progress)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zip_file:
                return _unpack(_zip_files(zip_file), archive, folder, inside, progress)
    except OSError as error:  # of the disk, or of gzip's and bzip2's contents
        reason = error.strerror or error
        raise ArchiveError(f'{archive} cannot be unpacked into {folder}: {reason}') from error
    except DAMAGE as error:
        raise ArchiveError(f'{archive}: damaged or incomplete ({error}); remove it') from error
    raise ArchiveError(f'{archive}: neither a zip nor a tar archive, or damaged; remove it')


def _tar_files(tar: tarfile.TarFile) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
    for member in tar:
        if member.isreg():
            yield member.name, member.size, lambda member=member: tar.extractfile(member)
        elif not member.isdir():
            raise ArchiveError(f'{tar.name}: refused, {member.name} is a link or a device')
    # tarfile takes a broken header, or none, for the end of the archive, which is zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f'broken header at byte {tar.offset}')


def _zip_files(
    zip_file: zipfile.ZipFile,
) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
    for info in zip_file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was not packed on Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f'{zip_file.filename}: refused, {info.filename} is a link')
        if info.flag_bits & 1:
            raise ArchiveError(f'{zip_file.filename}: {info.filename} is encrypted')
        if not info.is_dir():
            yield info.filename, info.file_size, lambda info=info: zip_file.open(info)


def _unpack(
    files: Iterator[tuple[str, int, Callable[[], BinaryIO]]],
    archive: Path,
    folder: Path,
    inside: str,
    progress: bool,
) -> int:
    """Writes (name, size, function that opens it) below a folder.

    Only plain files get here and names are checked, so nothing is left for the filters of
    `extractall`, which older Pythons lack.
    """
    outer = PurePosixPath(inside)
    chosen = []
    for name, size, source in files:
        path = PurePosixPath(name.replace('\\', '/'))
        if path.is_absolute() or '..' in path.parts or re.match('[A-Za-z]:', name):
            raise ArchiveError(f'{archive}: refused, {name} would be written outside of {folder}')
        if outer in path.parents:
            chosen.append((folder / path.relative_to(outer), size, source))
    if not chosen:
        raise ArchiveError(f'{archive}: no files in it' + (f' below {inside}' if inside else ''))
    total = sum(size for _, size, _ in chosen)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ArchiveError(
            f'{archive}: {total:,} bytes when unpacked, but only {free:,} are free in {folder}'
        )
    with _bar(f'unpacking {archive.name}', total, 0, progress) as advance:
        for path, size, source in chosen:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f'{path.name}.part')
            with source() as content, part.open('wb') as file:
                shutil.copyfileobj(content, file, CHUNK)
            part.replace(path)  # an interrupted run leaves no half file under its name
            advance(size)
    return len(chosen)
