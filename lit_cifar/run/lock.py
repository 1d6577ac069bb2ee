"""The lock of a run's folder: one process at a time trains there, on whichever machine. folder.py takes it and gives it
back."""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.files import BINARY, writing
from lit_cifar.text import printable

WAIT_SECONDS = 10.0  # for a process that is on its way out, as when a launcher starts its processes again
# follows no link, which may lead anywhere, and waits for no pipe; Windows has neither
FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | BINARY


class FolderLock:
    """A file, locked while a process trains in its folder, that says which process that is.

    The system releases the lock when the process ends, `kill -9` included; NFS (4 or later) and other shared file
    systems pass it on to other machines. After an orderly end the file is gone.

    It is a lock of the open file (flock), which processes forked from the holder inherit, and would keep when it dies:
    they close the file. POSIX's own locks are not inherited, but end as soon as anything in the process, such as a
    callback that copies the folder, has opened and closed the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Takes the lock, waiting for WAIT_SECONDS; warns where nothing can tell whether another process is at work.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        end = time.monotonic() + WAIT_SECONDS
        while self._handle is None:
            with writing(self.path, "make its folder writable"):
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise UserError(f"{self.path} is no file: remove it")
                locked = _lock(handle)
                host, holder = _holder(handle)
                if locked is False and time.monotonic() > end:
                    raise UserError(
                        f"{self.path.parent} is in use by {holder or 'another process'}: wait until it ends, or stop "
                        f"it; if its machine was lost, remove {self.path}"
                    )
                if locked is not False and self._is_ours(handle):
                    self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)
            if self._handle is None:
                time.sleep(0.1)
                continue
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._close)
            self._warn(locked is True, host, holder)
            self._write()

    def release(self) -> None:
        """Gives the lock back and removes the file; does nothing without the lock."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                is_ours = self._is_ours(self._handle)  # or somebody removed it, and another process has its own
                if sys.platform == "win32":  # removes no open file, and so not that of a process that has it by now
                    self._close()
                if is_ours:
                    self.path.unlink()
            self._close()

    def _is_ours(self, handle: int) -> bool:
        """Whether the file still has its name: the process that held it before may have removed it just now."""
        try:
            return sys.platform == "win32" or os.path.samestat(os.fstat(handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _warn(self, is_locked: bool, host: str, holder: str) -> None:
        """Says what the lock cannot tell, of the process that left the file behind."""
        if not is_locked:
            log.warn(
                f"the file system of {self.path.parent} has no file locks, so nothing can tell whether another process "
                f"trains this run{f'; {holder} did, and has not ended in order' if holder else ''}"
            )
        elif holder and host != socket.gethostname():
            log.warn(
                f"{self.path.parent} was in use by {holder}, which did not end in order: make sure that it is gone, "
                "as not every file system passes locks on to other machines"
            )

    def _write(self) -> None:
        assert self._handle is not None
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            with writing(self.path, "make room or make its folder writable"):
                os.ftruncate(self._handle, 0)
                os.lseek(self._handle, 0, os.SEEK_SET)
                os.write(self._handle, (json.dumps(holder) + "\n").encode())
        except UserError:
            self.release()
            raise


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file, as far as the file system tells."""
    try:
        handle = os.open(path, os.O_RDONLY | FLAGS)
    except OSError:
        return False
    try:
        return _lock(handle, shared=True) is False
    finally:
        os.close(handle)


def _lock(handle: int, shared: bool = False) -> bool | None:
    """Whether the lock was to be had; None where the file system has no locks. Shared, it does for reading."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 2**30, os.SEEK_SET)  # nobody could read what is locked there
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _holder(handle: int) -> tuple[str, str]:
    """The host and the description of the process that wrote itself into the file; empty if none did."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 1000))
        host, since = str(found["host"]), printable(str(found["since"]))
        return host, f"process {int(found['pid'])} on {printable(host)} since {since}"
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return "", ""
