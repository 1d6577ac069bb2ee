"""A verified archive on the disk, from the first mirrors that deliver. mirror.py knows one mirror, archives.py what
the archive should be and how it is unpacked.

The mirrors are asked in turn and continue each other's bytes; nothing gets its final name before the whole of it
was verified (the archive) or written (the folder), and both get it by one rename.
"""

import os
import sys
import time
from collections.abc import Sequence
from concurrent import futures
from contextlib import closing
from operator import attrgetter
from pathlib import Path
from typing import Any

from lit_cifar import log
from lit_cifar.data.archives import Archive, disk, fsync, locked, sha256_of, unpack_verified, verify
from lit_cifar.data.mirror import Body, Limits, Mirror, MirrorError, host_of, innermost
from lit_cifar.errors import UserError
from lit_cifar.files import move

EARLIER_RUN = "an earlier run"  # stands among the givers for the bytes of a part file that was there at the start


def fetch_folder(
    folder: Path, spec: Archive, mirrors: Sequence[str] | None = None, *, limits: Limits | None = None
) -> Path:
    """Gives `folder`/`spec.folder`: at once when it is there, otherwise from the archive `folder`/`spec.name`, fetched
    from the first mirrors that deliver when it is absent.

    Any number of processes may call this at once: one works, the others wait.

    Args:
        folder: where the archive is kept; made if need be.
        spec: the archive.
        mirrors: addresses in place of the archive's own mirrors: URLs (http, https, file) of the archive, or paths of
            it or of the folder that holds it.
        limits: when a mirror is left for the next.

    Raises:
        UserError: no mirror delivers, a bad archive is there already (it is left alone), or the folder cannot be
            written, locked or has no room. Bytes that have arrived are kept and continued by the next call.
    """
    ready = folder / spec.folder
    if ready.is_dir():
        return ready
    limits = limits or Limits()
    with locked(folder, spec, limits.quiet_seconds):
        if ready.is_dir():  # made by another process while this one waited
            return ready
        archive = folder / spec.name
        if archive.exists():
            verify(archive, spec)
        else:
            _Download(folder, spec.mirrors if mirrors is None else mirrors, spec, limits).run()
        return unpack_verified(archive, folder, spec)


class _MixedError(Exception):
    """The sum is wrong and several mirrors gave bytes: which of them lied cannot be known."""


class _Download:
    """The part file, who gave its bytes, and the mirrors."""

    def __init__(self, folder: Path, addresses: Sequence[str], spec: Archive, limits: Limits) -> None:
        self.folder, self.spec, self.limits = folder, spec, limits
        self.mirrors = [Mirror(address, spec, limits) for address in dict.fromkeys(addresses)]
        self.part = folder / f".{spec.name}.part"
        self.givers = {EARLIER_RUN} if self._size() else set()  # addresses
        self.gained = 0  # bytes that the last try added to the part
        self.alone = False  # each mirror from zero, so that wrong bytes have one author

    def run(self) -> None:
        if self._size() >= self.spec.num_bytes and self._finish():  # killed just before the rename
            return
        try:
            mirror = self._rounds()
        except _MixedError:
            self.alone = True  # nobody's bytes mix any more, so this happens once
            mirror = self._rounds()
        log.tell(f"{self.spec.title} is complete and verified, from {mirror.host}")

    def _rounds(self) -> Mirror:
        """The mirror that completed the archive: all are tried once, then those that have bytes at any rate."""
        for mirror in self.mirrors:
            if self._try(mirror, last_resort=False):
                return mirror
        if not any(mirror.has_delivered for mirror in self.mirrors):  # an answer may still come, if there is a network
            late = [mirror.late for mirror in self.mirrors if mirror.late is not None]
            futures.wait(late, timeout=self.limits.connect_seconds / 2)
        again = [mirror for mirror in self.mirrors if mirror.is_worth_waiting_for]
        for mirror in sorted(again, key=attrgetter("is_slow")):
            self.gained = self.spec.num_bytes
            while self.gained > self.spec.num_bytes // 1000:  # one that closes early is asked on while it brings much
                if self._try(mirror, last_resort=True):
                    return mirror
        raise UserError(self._failure())

    def _try(self, mirror: Mirror, last_resort: bool) -> bool:
        """Continues the part from one mirror; True when that completed the archive."""
        from urllib3.exceptions import HTTPError

        self.gained = 0
        if mirror.has_lied:
            return False
        if self.alone and self.givers - {mirror.address}:
            self._discard()
        try:
            start, body = mirror.open(self._size(), last_resort)
            with closing(body):
                self._receive(mirror, body, start, last_resort)
        except (MirrorError, OSError, HTTPError) as error:
            self._leave(mirror, innermost(error))
            return False
        givers = self.givers.copy()
        if self._finish():
            return True
        if givers != {mirror.address}:
            hosts = ", ".join(sorted(map(host_of, givers)))
            log.warn(f"wrong SHA-256 of bytes from {hosts}: thrown away, starting afresh")
            raise _MixedError
        mirror.has_lied = True
        self._leave(mirror, "its bytes have the wrong SHA-256 and were thrown away")
        return False

    def _receive(self, mirror: Mirror, body: Body, start: int, last_resort: bool) -> None:
        size = self._size()
        needed = f"{self.spec.num_bytes} bytes for {self.spec.name}, of which {size} are there"
        with disk(self.folder, needed):
            part = self.part.open("ab", buffering=0)  # what has arrived survives a kill
        with part, closing(_Progress(self.spec, mirror.host, size, self.limits.report_seconds)) as progress:
            for data in mirror.receive(body, start, size, last_resort):
                self.givers.add(mirror.address)
                with disk(self.folder, needed):
                    _write(part.fileno(), data)
                size += len(data)
                self.gained += len(data)
                progress.update(size)

    def _finish(self) -> bool:
        """Gives a whole and right part its final name; throws a wrong one away."""
        with disk(self.folder, "room"):
            if sha256_of(self.part) != self.spec.sha256:
                self._discard()
                return False
            fsync(self.part)
            move(self.part, self.folder / self.spec.name)
            fsync(self.folder)
        return True

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.givers = set()
        self.part.unlink(missing_ok=True)

    def _leave(self, mirror: Mirror, reason: str) -> None:
        mirror.left_because = reason
        log.tell(f"left {mirror.host}: {reason}")

    def _failure(self) -> str:
        reasons = [f"{mirror.host}: {mirror.left_because}" for mirror in self.mirrors if mirror.left_because]
        if any(mirror.has_answered or mirror.has_delivered for mirror in self.mirrors):
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
        if log.is_terminal(sys.stderr) and log.is_said("info"):
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


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a nearly full disk takes a piece, and refuses only the next
        rest = rest[os.write(fd, rest) :]
