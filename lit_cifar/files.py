"""Files that are whole or absent, whatever happens in between. What is in them is the callers'."""

import contextlib
import errno
import json
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_cifar import log
from lit_cifar.errors import UserError

READER_SECONDS = 60.0  # that a named pipe may lack a reader
BUSY_SECONDS = 10.0  # that a file may be open where that keeps it from being replaced, on Windows
BINARY = getattr(os, "O_BINARY", 0)  # without it Windows would write \r\n
MAX_BYTES = 2**27  # of a run's file of JSON; the results of 1,000 classes have 10 million at most


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place, durably, when the block ends without an error.

    A link is replaced, not followed: one in a folder from elsewhere cannot choose another place to write to.

    Raises:
        OSError: the folder cannot be written, the disk is full, or `path` is no file; what it held is untouched.
    """
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # with a part of the name only, as names end at 255 bytes
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # gone, or open elsewhere on Windows
            temporary.unlink()
        raise
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder, also onto a file that is there. Windows refuses that while somebody has one of the two
    open, such as `runs`, a copy or a virus scanner: it is tried again for BUSY_SECONDS.

    Raises:
        OSError: that was not enough, or it cannot be done; both are as they were.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > end:
                raise
        time.sleep(0.05)


def _check_replaceable(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise OSError(errno.EEXIST, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file to read, which may be a stranger's: a pipe would keep its reader waiting, a device be endless.

    Raises:
        OSError: it is no regular file, or it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | BINARY)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")


def read_whole(path: Path) -> bytes:
    """All of a file, as `open_regular`; OSError also if it has more than MAX_BYTES bytes."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has {num_bytes:,} bytes")
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """The map that a file of JSON holds; an empty one where it cannot be read, or holds something else."""
    try:
        content = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_durably(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all, and onto the disk before it returns."""
    with replaced(path) as file:
        file.write(data)


def write_output(path: Path, data: bytes) -> None:
    """Writes `data` where a person said: as `write_durably`, but links are followed, and a device, a pipe or this
    process's own standard output is written to, never replaced.

    Raises:
        OSError: as `replaced`; or nothing reads a named pipe for READER_SECONDS.
    """
    target = _target(path)
    handle = None if target is None else _handle_of_stream(target)
    if handle is None and target is not None and not stat.S_ISREG(target.st_mode) and not stat.S_ISDIR(target.st_mode):
        handle = _open_special(path, target)
    if handle is None:
        write_durably(Path(os.path.realpath(path)), data)
        return
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _target(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:  # or a link that leads nowhere yet
        return None


def _handle_of_stream(target: os.stat_result) -> int | None:
    """A handle that goes on where standard output or error is, if that is the target; it may be a file."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError, ValueError):  # closed, or not a file at all
            # Windows gives what is no file, such as NUL and the console, the number 0
            if target.st_ino and os.path.samestat(os.fstat(stream.fileno()), target):
                stream.flush()
                return os.dup(stream.fileno())
    return None


def _open_special(path: Path, target: os.stat_result) -> int:
    if not stat.S_ISFIFO(target.st_mode) or sys.platform == "win32":  # where named pipes are no files
        return os.open(path, os.O_WRONLY | BINARY)
    end = time.monotonic() + READER_SECONDS
    is_told = False
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # or it waits for a reader for ever
            os.set_blocking(handle, True)
            return handle
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if time.monotonic() > end:
            raise OSError(errno.ENXIO, f"nothing has read this pipe for {READER_SECONDS:.0f} s")
        if not is_told:
            log.tell(f"waiting for something that reads the pipe {path}")
            is_told = True
        time.sleep(0.05)


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Around what writes `path`: says in one line that it cannot be written, and the way out.

    Raises:
        UserError: the disk is full, a folder is in the way, the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {way_out}") from error


def check_place(path: Path, way_out: str) -> None:
    """Checks, before the work whose result goes to `path`, that `write_durably` can write it, as far as can be told
    without writing.

    Raises:
        UserError: as `writing`.
    """
    with writing(path, way_out):
        _check_replaceable(path)
        folder = path.absolute().parent
        while not os.path.lexists(folder) and folder != folder.parent:  # missing folders are made, but no Windows drive
            folder = folder.parent
        if not os.path.isdir(folder):
            raise OSError(errno.ENOTDIR, f"{folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, f"the folder {folder} cannot be written")


def check_output(path: Path, way_out: str) -> None:
    """As `check_place`, for `write_output`."""
    with writing(path, way_out):
        target = _target(path)
    if target is None or stat.S_ISREG(target.st_mode) or stat.S_ISDIR(target.st_mode):
        check_place(Path(os.path.realpath(path)), way_out)


def local_path(path: str | os.PathLike[str], setting: str) -> Path:
    """The path with ~ expanded.

    Args:
        path: as it was typed.
        setting: where, such as "--data_dir", for the message.

    Raises:
        UserError: it is the URL of something elsewhere.
    """
    text = os.fspath(path)
    if found := re.match(r"([a-zA-Z][\w+.-]+)://?", text):
        raise UserError(f"{setting} {text}: {found[1]}:// is not supported here; name a path on this machine")
    return Path(os.path.expanduser(text))


def sync_folder(folder: Path) -> None:
    """Brings renames in a folder onto the disk; does nothing where folders cannot be opened (Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # not every file system syncs folders
        pass
    finally:
        os.close(handle)
