"""Files that are whole or absent, whatever happens in between. What is in them is the callers'."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lit_cifar.errors import UserError


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place, durably, when the block ends without an error.

    Raises:
        OSError: the folder cannot be written, or the disk is full; what `path` held is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all, and onto the disk before it returns."""
    with replaced(path) as file:
        file.write(data)


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
    return Path(text).expanduser()


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
