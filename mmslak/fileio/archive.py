"""Archives, unpacked inside of their folder only."""

import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from rich.console import Console
from rich.progress import track

from mmslak.errors import UserError

DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(LookupError, RuntimeError, ValueError),
)
Members = Iterator[tuple[str, Callable[[], BinaryIO]]]  # names, and functions that open them


class ArchiveError(UserError):
    """An archive cannot be unpacked, or must not be."""


def unpack(archive: str | Path, folder: str | Path, inside: str = '', progress: bool = True) -> int:
    """Unpacks a zip or tar archive into a folder.

    Names are checked before the first file is written. An archive with a path that leads out of the
    folder, a link or a device is refused. (tarfile's filter 'data' allows links, older Pythons lack
    it, and zip files have no filter.)

    Args:
        archive: The archive, also compressed.
        folder: Where to write. It is made if it does not exist.
        inside: Folder in the archive. Its content alone is written, without the folder itself; ''
            writes all.
        progress: Whether to show a progress bar.

    Returns:
        Number of files written.

    Raises:
        ArchiveError: If the archive is damaged, dangerous or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        # A tar archive may end in a zip file, but not the other way round.
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                return _write(_tar_files(tar), archive, folder, inside, progress)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zip_file:
                return _write(_zip_files(zip_file), archive, folder, inside, progress)
    except OSError as error:  # of the disk, or of gzip's and bzip2's contents
        reason = error.strerror or error
        raise ArchiveError(f'{archive} cannot be unpacked into {folder}: {reason}') from error
    except ArchiveError:
        raise
    except DAMAGE as error:
        raise ArchiveError(f'{archive}: damaged or incomplete ({error}); remove it') from error
    raise ArchiveError(f'{archive}: neither a zip nor a tar archive, or damaged; remove it')


def _tar_files(tar: tarfile.TarFile) -> Members:
    for member in tar:
        if member.isreg():
            yield member.name, lambda member=member: tar.extractfile(member)
        elif not member.isdir():
            raise ArchiveError(f'{tar.name}: refused, {member.name} is a link or a device')
    # tarfile takes a broken header, or none, for the end of the archive, which is zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f'broken header at byte {tar.offset}')


def _zip_files(zip_file: zipfile.ZipFile) -> Members:
    for info in zip_file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was not packed on Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f'{zip_file.filename}: refused, {info.filename} is a link')
        if not info.is_dir():
            yield info.filename, lambda info=info: zip_file.open(info)


def _write(members: Members, archive: Path, folder: Path, inside: str, progress: bool) -> int:
    outer, chosen = PurePosixPath(inside), []
    for name, opened in members:
        path = PurePosixPath(name.replace('\\', '/'))
        if path.is_absolute() or '..' in path.parts or re.match('[A-Za-z]:', name):
            raise ArchiveError(f'{archive}: refused, {name} would be written outside of {folder}')
        if outer in path.parents:
            chosen.append((folder / path.relative_to(outer), opened))
    if not chosen:
        raise ArchiveError(f'{archive}: no files in it' + (f' below {inside}' if inside else ''))
    console = Console(stderr=True)
    title = f'unpacking {archive.name}'
    for path, opened in track(chosen, title, console=console, disable=not progress):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f'{path.name}.part')
        with opened() as content, part.open('wb') as file:
            shutil.copyfileobj(content, file)
        part.replace(path)  # an interrupted run leaves no half file under its name
    return len(chosen)
