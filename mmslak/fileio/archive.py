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

from mmslak.errors import UserError
from mmslak.fileio.download import CHUNK, progress_bar

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


class ArchiveError(UserError):
    """An archive that cannot be unpacked, or must not be."""


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
    except ArchiveError:
        raise
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
    with progress_bar(f'unpacking {archive.name}', total, 0, progress) as advance:
        for path, size, source in chosen:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f'{path.name}.part')
            with source() as content, part.open('wb') as file:
                shutil.copyfileobj(content, file, CHUNK)
            part.replace(path)  # an interrupted run leaves no half file under its name
            advance(size)
    return len(chosen)
