"""Reads the members of zip and tar archives that nobody vouches for; nothing is unpacked to the disk. Which members
are images of a tree is decided in tree.py; the published archives of CIFAR are in archives.py."""

import functools
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lit_cifar.errors import UserError
from lit_cifar.text import printable

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
MAX_MEMBER_BYTES = 64 * 2**20
MAX_NAME_BYTES = 2**20
# the members of a tar file that hold the name and properties of the next one
NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class Member(NamedTuple):
    """A file or folder in an archive. `parts` are its path's, without what means the same folder."""

    parts: tuple[str, ...]
    data: bytes | None  # None for a folder


def read_members(path: Path, is_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[Member]:
    """Yields an archive's folders and the files whose path `is_wanted`, in the archive's order; links are left out.

    Raises:
        UserError: the archive is damaged or cut short, or a wanted member has more than MAX_MEMBER_BYTES.
    """
    try:
        for name, read, num_bytes in _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path):
            parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
            if read is None:
                yield Member(parts, None)
            elif is_wanted(parts):
                if num_bytes > MAX_MEMBER_BYTES:
                    raise UserError(
                        f"{path}: {printable(name)} has {num_bytes} bytes, more than the {MAX_MEMBER_BYTES} that an "
                        "image may have; shrink or remove it"
                    )
                yield Member(parts, read())
    except UserError:
        raise
    except Exception as error:  # tarfile, zipfile, lzma, zlib and gzip raise a dozen kinds for damage
        detail = printable(str(error)) or type(error).__name__
        raise UserError(f"{path} is damaged or cut short ({detail}); get it anew") from error


def first_folder(path: Path) -> str | None:
    """The first part of the first member's path in a tar.gz file; None where that cannot be read or there is none."""
    try:
        with tarfile.open(path, "r:gz", tarinfo=_StrictTarInfo) as tar:
            first = tar.next()
    except (OSError, EOFError, tarfile.TarError):
        return None
    return next(iter(PurePosixPath(first.name).parts), None) if first else None


_Found = tuple[str, Callable[[], bytes] | None, int]  # name, how to read it (None for a folder), size in bytes


def _zip_members(path: Path) -> Iterator[_Found]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                yield info.filename, None, 0
            elif stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG):
                yield info.filename, functools.partial(_read_zipped, archive, info), info.file_size


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member in small pieces: read at once, it is unpacked to its end first, however far that is beyond its size."""
    with archive.open(info) as stream:
        return b"".join(iter(functools.partial(stream.read, zipfile.ZipExtFile.MIN_READ_SIZE), b""))


def _tar_members(path: Path) -> Iterator[_Found]:
    with tarfile.open(path, tarinfo=_StrictTarInfo) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # 2 KB for each of 60,000, kept for lookups never made
            if info.isdir():
                yield info.name, None, 0
            elif info.isreg():
                stream = tar.extractfile(info)
                assert stream is not None
                yield info.name, stream.read, info.size
        assert tar.fileobj is not None
        while tar.fileobj.read(2**20):  # to the end, where gzip and xz keep the sums that prove the rest
            pass


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first for the archive's end; here only the end mark is.

    Long names and sparse files, which it would read into memory whatever their size, end at MAX_NAME_BYTES.
    """

    @classmethod
    def frombuf(cls, *args: Any) -> "_StrictTarInfo":
        info = super().frombuf(*args)
        if info.type in NAME_TYPES and info.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {info.size} bytes")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file, which only GNU tar writes")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(str(error)) from error
