"""Files from the net: a broken download goes on where it stopped, and files are verified."""

import errno
import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from email.utils import formatdate
from pathlib import Path

from rich.console import Console
from rich.progress import wrap_file

from mmslak.errors import UserError

CHUNK = 1 << 18  # bytes
RETRIES = 4  # in a row, each without more bytes than before
WAIT = 2.0  # seconds before a retry
TIMEOUT = 30.0  # seconds without a byte
# Errors of the disk. All others of a download are errors of the net.
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class DownloadError(UserError):
    """A file cannot be downloaded. The message says why and what to do."""


def fetch(url: str, target: str | Path, checksum: str | None = None, progress: bool = True) -> Path:
    """Downloads a file, or the rest of it.

    The file is `NAME.part` until it is complete. If the connection breaks, the download goes on by
    itself; after some failures it stops, and the next call goes on. If the server cannot send the
    rest, or has changed the file, the download starts again.

    Args:
        url: An http or https address.
        target: The file to write. If it exists, it is only verified.
        checksum: 'md5:…' or 'sha256:…' in hexadecimal digits; None verifies the size alone.
        progress: Whether to show a progress bar.

    Returns:
        target

    Raises:
        DownloadError: If the file does not exist, cannot be reached or written, or has another
            checksum. Such a file is moved to `NAME.corrupt`, so that the next call starts again.
    """
    target = Path(target)
    part = target.with_name(f'{target.name}.part')
    if not url.startswith(('http://', 'https://')):
        raise DownloadError(f'{url}: expected an address that begins with http:// or https://')
    try:
        if target.is_file():
            _verify(target, target, checksum, url)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _receive_all(url, part, progress)
            _verify(part, target, checksum, url)
            part.replace(target)
    except OSError as error:
        raise DownloadError(
            f'{part} cannot be written: {error.strerror or error}; '
            'make room or choose another folder, then run the command again'
        ) from error
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
            f'{page} is on Google Drive; install gdown to download it: pip install gdown'
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        gdown.download(id=file_id, output=str(target), quiet=not progress, resume=True)
    except Exception as error:  # its own, those of requests, of the file system
        raise DownloadError(f'{page}: {" ".join(str(error).split())}') from error
    if not target.is_file():  # older versions of gdown print the reason and return
        raise DownloadError(f'{page}: gdown could not download it')
    return target


def _receive_all(url: str, part: Path, progress: bool) -> None:
    """Repeats requests until the file is complete."""
    failures, most = 0, _size(part)
    while True:
        try:
            return _receive(url, part, progress)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, 'errno', None) in DISK:
                raise
            size = _size(part)
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if failures > RETRIES:
                reason = str(error).strip('<>') or type(error).__name__
                kept = f'{size:,} bytes are kept in {part}; ' if size else ''
                raise DownloadError(
                    f'{url}: {reason}; {kept}check the connection and run the command again'
                ) from error
            time.sleep(WAIT)


def _receive(url: str, part: Path, progress: bool) -> None:
    """Makes one request, and adds the rest to `part` or writes it again."""
    have = _size(part)
    request = urllib.request.Request(url, headers={'User-Agent': 'mmslak'})
    if have:
        request.add_header('Range', f'bytes={have}-')
        # The rest of a file that has changed since then would not fit.
        request.add_header('If-Unmodified-Since', formatdate(part.stat().st_mtime, usegmt=True))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get('Content-Range') == f'bytes */{have}':
                return  # nothing is left to send
            if error.code in (412, 416):
                part.unlink()
                raise ConnectionError('the server has another file now') from error
            if error.code < 500:
                raise DownloadError(f'{url}: {error.code} {error.reason}') from error
        raise
    with response:
        if response.headers.get_content_type() == 'text/html':
            raise DownloadError(
                f'{url}: a web page came in place of the file; it has moved or needs a login'
            )
        resumed = response.status == 206
        if resumed and not response.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
            part.unlink()
            raise ConnectionError('the server sent another part than asked for')
        length = int(response.headers.get('Content-Length', 0))
        bar = wrap_file(
            response,
            length,
            description=part.stem,
            console=Console(stderr=True),
            disable=not progress,
        )
        with part.open('ab' if resumed else 'wb') as file, bar as body:
            shutil.copyfileobj(body, file, CHUNK)
    total = length + resumed * have
    if length and _size(part) != total:
        raise ConnectionError(f'the connection broke off, {total:,} bytes expected')


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _verify(path: Path, target: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(':')
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open('rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        aside = target.with_name(f'{target.name}.corrupt')
        path.replace(aside)
        raise DownloadError(
            f'{target}: {kind} of {url} expected {expected}, got {digest.hexdigest()}; '
            f'the file is now {aside}; run the command again to download it again'
        )
