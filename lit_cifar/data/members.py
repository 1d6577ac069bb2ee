"""Reads the members of zip and tar archives that nobody vouches for; nothing is unpacked to the disk. Which members
are images of a tree is decided in packed.py; the published archives of CIFAR are in archives.py."""

import functools
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from lit_cifar.errors import UserError
from lit_cifar.text import printable

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
MAX_MEMBER_BYTES = 64 * 2**20
MAX_NAME_BYTES = 2**20
MAX_PATH = 4096  # characters, as on Linux
MAX_STEPS = 1000  # parts of paths on the way to where a link leads
# the members of a tar file that hold the name and properties of the next one
NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
Kind = Literal["folder", "file", "link", "special"]


class Member(NamedTuple):
    """What an archive holds at a path, which has neither empty parts nor '.' or '..'."""

    path: str
    kind: Kind
    data: bytes | None = None  # of a wanted file
    target: str = ""  # of a link; from the archive's top where it begins with /, else from the link's folder


def read_members(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yields what is in an archive, in its order, with the data of the files whose path `is_wanted`.

    Raises:
        UserError: the archive is damaged or cut short, or a wanted member has more than MAX_MEMBER_BYTES.
    """
    try:
        for found in _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path):
            name, data = clean_path(found.name), None
            if max(len(found.name), len(found.target)) > MAX_PATH:
                raise UserError(f"{path} holds a path of more than {MAX_PATH} characters; rename it and pack it anew")
            if found.kind == "file" and is_wanted(name):
                if found.num_bytes > MAX_MEMBER_BYTES:
                    raise UserError(
                        f"{path}: {printable(found.name)} has {found.num_bytes} bytes, more than the "
                        f"{MAX_MEMBER_BYTES} that an image may have; shrink or remove it"
                    )
                data = found.read()
            yield Member(name, found.kind, data, found.target)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the name {error.object!r} in it is not UTF-8; rename it and pack it anew") from error
    except Exception as error:  # tarfile, zipfile, lzma, zlib and gzip raise a dozen kinds for damage
        detail = printable(str(error)) or type(error).__name__
        raise UserError(f"{path} is damaged or cut short ({detail}); get it anew") from error


def clean_path(name: str) -> str:
    """A path without parts that are empty, '.' or '..'; what leads above the archive's top stays there."""
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


class Links:
    """The links of an archive, hard and symbolic, and where they lead; each costs some 300 bytes of memory."""

    def __init__(self) -> None:
        self._targets: dict[str, str] = {}

    def add(self, link: Member) -> None:
        self._targets[link.path] = link.target.replace("\\", "/")

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def resolve(self, path: str) -> str | None:
        """The path that a path leads to, without links in it; None for one that leads out of the archive or in a loop.

        There need not be anything.
        """
        ahead, behind = path.split("/")[::-1], list[str]()
        for _ in range(MAX_STEPS):
            if not ahead:
                return "/".join(behind)
            part = ahead.pop()
            if part == "..":
                if not behind:
                    return None
                behind.pop()
            elif part not in ("", "."):
                behind.append(part)
                target = self._targets.get("/".join(behind))
                if target == "":
                    return None
                if target is not None:
                    behind = [] if target.startswith("/") else behind[:-1]
                    ahead += target.split("/")[::-1]
        return None


def first_folder(path: Path) -> str | None:
    """The first part of the first member's path in a tar.gz file; None where that cannot be read or there is none."""
    try:
        with tarfile.open(path, "r:gz", tarinfo=_StrictTarInfo) as tar:
            first = tar.next()
    except (OSError, EOFError, tarfile.TarError):
        return None
    return next(iter(PurePosixPath(first.name).parts), None) if first else None


class _Found(NamedTuple):
    name: str
    kind: Kind
    read: Callable[[], bytes] = bytes  # of a file
    num_bytes: int = 0
    target: str = ""


def _zip_members(path: Path) -> Iterator[_Found]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind, name = stat.S_IFMT(info.external_attr >> 16), _zip_name(info)
            if info.is_dir():
                yield _Found(name, "folder")
            elif kind in (0, stat.S_IFREG):
                yield _Found(name, "file", functools.partial(_read_zipped, archive, info), info.file_size)
            elif kind == stat.S_IFLNK and info.file_size <= MAX_NAME_BYTES:
                yield _Found(name, "link", target=_read_zipped(archive, info).decode("utf-8", "surrogateescape"))
            else:
                yield _Found(name, "special")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name. macOS writes UTF-8 and does not say so, and zipfile takes it for the code page of MS-DOS."""
    if not info.flag_bits & 0x800 and not info.filename.isascii():
        try:
            return info.filename.encode("cp437").decode()
        except UnicodeError:
            pass
    return info.filename


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member in small pieces: read at once, it is unpacked to its end first, however far that is beyond its size."""
    with archive.open(info) as stream:
        return b"".join(iter(functools.partial(stream.read, zipfile.ZipExtFile.MIN_READ_SIZE), b""))


def _tar_members(path: Path) -> Iterator[_Found]:
    with tarfile.open(path, tarinfo=_StrictTarInfo, encoding="utf-8") as tar:  # whatever this system's locale is
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # 2 KB for each of 60,000, kept for lookups never made
            if info.isdir():
                yield _Found(info.name, "folder")
            elif info.isreg():
                stream = tar.extractfile(info)
                assert stream is not None
                yield _Found(info.name, "file", stream.read, info.size)
            elif info.issym() or info.islnk():  # a hard link names its target from the archive's top
                yield _Found(info.name, "link", target=f"/{info.linkname}" if info.islnk() else info.linkname)
            else:
                yield _Found(info.name, "special")
        assert tar.fileobj is not None
        while tar.fileobj.read(2**20):  # to the end, where gzip and xz keep the sums that prove the rest
            pass


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first for the archive's end; here only the end mark is.

    Long names and sparse files, which it would read into memory whatever their size, end at MAX_NAME_BYTES.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        """Reads what follows a header; frombuf, which is public, is passed by since Python 3.14.8."""
        if self.type in NAME_TYPES and self.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file, which only GNU tar writes")
        return super()._proc_member(tar)  # type: ignore[misc]

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(str(error)) from error
