"""A pretended Windows, as far as Python can tell: for lit_cifar alone, `sys.platform` is win32, and modules and names
that Windows lacks are missing; for all, open files can be neither renamed nor removed, text is cp1252 where no encoding
is named, and there is no /proc. Linux only: /proc says which files are open. What Windows itself does was not tried."""

import builtins
import ctypes
import errno
import fcntl
import io
import os
import select
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "crypt", "readline")
MISSING = {
    "os": (
        *("fork", "forkpty", "register_at_fork", "posix_spawn", "wait", "wait3", "wait4", "killpg", "nice", "uname"),
        *("getuid", "geteuid", "getgid", "getegid", "getpgid", "getpgrp", "getsid", "setsid", "setpgid", "getgroups"),
        *("mkfifo", "mknod", "chown", "lchown", "fchown", "fchmod", "statvfs", "fstatvfs", "sysconf", "pathconf"),
        *("sched_getaffinity", "sched_setaffinity", "getloadavg", "sync", "fdatasync", "pread", "pwrite", "sendfile"),
        *("O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC", "set_blocking", "get_blocking", "ttyname"),
        *("openpty", "ctermid", "memfd_create", "eventfd", "getxattr", "setxattr", "WIFSIGNALED", "WTERMSIG"),
    ),
    "signal": (
        *("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD", "SIGQUIT", "SIGSTOP", "SIGCONT"),
        *("alarm", "setitimer", "getitimer", "ITIMER_REAL", "pthread_sigmask", "pthread_kill", "sigwait", "pause"),
    ),
    "select": ("poll", "epoll", "kqueue"),
    "time": ("tzset", "clock_gettime"),
    "socket": ("AF_UNIX",),
}


class _Module(types.ModuleType):
    """A module as the package finds it; who sets something in it sets it in the true one."""

    def __init__(self, module: types.ModuleType, **instead: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__["_true"], self.__dict__["_instead"] = module, instead

    def __getattr__(self, name: str) -> Any:
        if name in self._instead:
            return self._instead[name]
        if name in MISSING.get(self.__name__, ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._true, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._true, name, value)


class Kernel:
    """kernel32, with a process's id as its handle."""

    def __init__(self, name: str) -> None:
        assert name == "kernel32"

        def open_process(access: int, inherit: bool, process: int) -> int | None:
            return process if _lives(process) else None

        self.OpenProcess = open_process  # which takes a restype

    def WaitForSingleObject(self, handle: Any, milliseconds: int) -> None:
        while _lives(handle.value):
            time.sleep(0.05)


def _lives(process: int) -> bool:
    return os.getppid() == process


def _no_library(name: str | None) -> None:
    raise TypeError if name is None else FileNotFoundError(errno.ENOENT, f"Could not find module {name!r}")


def _locking(handle: int, mode: int, num_bytes: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


MSVCRT = types.SimpleNamespace(locking=_locking, LK_NBLCK=2)
WINDOWS = {
    "sys": _Module(sys, platform="win32"),
    "os": _Module(os, O_BINARY=0),
    "signal": _Module(signal, SIGBREAK=signal.SIGUSR2),
    "select": _Module(select),
    "ctypes": _Module(ctypes, CDLL=_no_library, WinDLL=Kernel),
}


def pretend(patch: pytest.MonkeyPatch) -> None:
    """From now on, until the patch is undone, this is Windows; modules of the package that were imported before keep
    what they computed on their import."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lit_cifar":
            for known, pretended in WINDOWS.items():
                if getattr(module, known, None) is pretended._true:
                    patch.setattr(module, known, pretended)
    patch.setattr(builtins, "__import__", _importing(builtins.__import__))
    patch.setattr(builtins, "open", _opening(open))
    patch.setattr(io, "open", builtins.open)
    for name in ("replace", "rename", "unlink", "remove"):
        patch.setattr(os, name, _unless_open(getattr(os, name)))


def _importing(true: Any) -> Any:
    def find(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and str((globals or {}).get("__name__")).split(".")[0] == "lit_cifar":
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name == "msvcrt":
                return MSVCRT
            if name in WINDOWS:
                return WINDOWS[name]
        return true(name, globals, locals, fromlist, level)

    return find


def _opening(true: Any) -> Any:
    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any
    ) -> Any:
        if str(file).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return true(file, mode, buffering, encoding, *rest, **more)

    return opened


def _unless_open(true: Any) -> Any:
    def change(*paths: Any, **more: Any) -> None:
        for path in paths[:2]:
            if is_open(path, more.get("dir_fd")):
                raise PermissionError(errno.EACCES, "it is being used by another process", str(path))
        true(*paths, **more)

    return change


def is_open(path: str | Path, folder: int | None = None) -> bool:
    """Whether this process has a file open, or one in a folder."""
    try:
        wanted = os.stat(path, dir_fd=folder, follow_symlinks=False)
        below = Path(path).resolve() if folder is None and os.path.isdir(path) else None
    except OSError:
        return False
    for number in os.listdir("/proc/self/fd"):
        try:
            found, name = os.fstat(int(number)), os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # that of the listing itself
            continue
        if os.path.samestat(found, wanted) and os.path.isfile(name):
            return True
        if below is not None and os.path.isfile(name) and below in Path(name).parents:
            return True
    return False
