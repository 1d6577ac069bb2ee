"""One mirror of an archive: opens it, receives its bytes, and remembers how it did. download.py decides which mirror
is asked next and what becomes of the bytes."""

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lit_cifar.data.archives import QUIET_SECONDS, Archive

if TYPE_CHECKING:
    import requests

READ_BYTES = 1 << 18


@dataclass(frozen=True)
class Limits:
    """When a mirror is left for the next. The defaults end a run without any network in under 30 s."""

    connect_seconds: float = 4.0  # name, connection, redirects and headers together
    stall_seconds: float = 10.0  # without a byte
    window_seconds: float = 8.0  # over which the rate is averaged
    bytes_per_second: float = 200e3  # asked of a mirror while others are untried
    report_seconds: float = 10.0  # between two lines of progress, where stderr is no terminal
    quiet_seconds: float = QUIET_SECONDS


class MirrorError(Exception):
    """Why a mirror is left for the next."""


class Body(Protocol):
    """What a mirror's bytes are read from."""

    def read1(self, num_bytes: int, /) -> bytes: ...  # what has arrived, so that a trickle cannot hold a read
    def close(self) -> object: ...


class Mirror:
    """A mirror and what is known of it.

    Args:
        address: an http(s):// or file:// URL of the archive, or the path of it or of the folder that holds it.
        spec: the archive that it should serve.
        limits: when it is left for the next.
    """

    def __init__(self, address: str, spec: Archive, limits: Limits) -> None:
        self.address, self.spec, self.limits = address, spec, limits
        self.host = host_of(address)
        self.has_delivered = False  # bytes, be they few
        self.is_slow = False
        self.has_lied = False  # gave all of an archive whose sum is wrong
        self.left_because = ""  # the last time
        self.late: futures.Future[requests.Response] | None = None  # an opening that was not waited for
        self._has_answered = False

    @property
    def has_answered(self) -> bool:
        """Whether an answer came, be it late or a refusal."""
        return self._has_answered or (self.late is not None and self.late.done() and not self.late.exception())

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether bytes can be expected of it where no mirror is fast: it gave some, or answered late."""
        return self.has_delivered or (self.late is not None and self.has_answered)

    def open(self, offset: int, last_resort: bool) -> tuple[int, Body]:
        """Opens the archive to go on at byte `offset`.

        Returns the offset of the first byte that comes, at most `offset`, and what to read from.

        Raises:
            MirrorError, OSError: it does not answer, or not with this archive.
        """
        path = _path_of(self.address, self.spec.name)
        if path is not None:
            if path.stat().st_size != self.spec.num_bytes:
                raise MirrorError(f"has {path.stat().st_size} bytes instead of {self.spec.num_bytes}")
            file = path.open("rb")
            file.seek(offset)
            return offset, file
        response = self._get(offset, last_resort)
        if response.status_code == 416:  # cannot continue there; it may have the whole
            response.close()
            response = self._get(0, last_resort)
        try:
            return self._first_byte(response, offset), response.raw
        except MirrorError:
            response.close()
            raise

    def receive(self, body: Body, start: int, offset: int, last_resort: bool) -> Iterator[bytes]:
        """Yields the archive's bytes from `offset` to its end, of a body that begins at `start`.

        Raises:
            MirrorError: it closes too early, or is slow and not the `last_resort`.
            OSError, urllib3.exceptions.HTTPError: the connection breaks.
        """
        limits, num_bytes = self.limits, self.spec.num_bytes
        skip = offset - start
        window_started_at, window_bytes = time.monotonic(), 0
        while offset < num_bytes:
            data = body.read1(READ_BYTES)
            if not data:
                raise MirrorError(f"closed after {offset} of {num_bytes} bytes")
            self.has_delivered = True
            fresh = data[skip : skip + num_bytes - offset]
            skip = max(0, skip - len(data))
            if fresh:
                offset += len(fresh)
                yield fresh
            window_bytes += len(data)
            seconds = time.monotonic() - window_started_at
            if seconds >= limits.window_seconds:
                if window_bytes < limits.bytes_per_second * seconds and not last_resort:
                    self.is_slow = True
                    raise MirrorError(f"slow: {window_bytes / seconds / 1e3:.0f} kB/s")
                window_started_at, window_bytes = time.monotonic(), 0

    def _get(self, offset: int, last_resort: bool) -> "requests.Response":
        import requests

        # half the time for one address, so that a dead IPv6 leaves time for IPv4
        timeouts = (self.limits.connect_seconds / 2, self.limits.stall_seconds)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        opening: futures.Future[requests.Response] = futures.Future()

        def get() -> None:
            try:
                opening.set_result(requests.get(self.address, headers=headers, stream=True, timeout=timeouts))
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
            self.late = opening
            raise MirrorError(f"no answer in {seconds:g} s")
        response = opening.result()
        self._has_answered = True
        return response

    def _first_byte(self, response: "requests.Response", offset: int) -> int:
        headers = response.headers
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if response.status_code == 206 and part and int(part[1]) <= offset:
            start, length = int(part[1]), part[2]
        elif response.status_code == 200:  # Range was not asked or is ignored: the whole comes
            start, length = 0, headers.get("Content-Length", "*")
        else:
            given = f"{response.status_code} {response.reason} {headers.get('Content-Range', '')}"
            raise MirrorError(f"answered {given.strip()}")
        if length not in ("*", str(self.spec.num_bytes)):
            raise MirrorError(f"has {length} bytes instead of {self.spec.num_bytes}")
        if headers.get("Content-Type", "").startswith("text/html"):  # the login page of a hotel, say
            raise MirrorError("answered with a web page")
        return start


def host_of(address: str) -> str:
    """How an address is named in messages: never with the password that may stand before the @."""
    return urlsplit(address).netloc.rpartition("@")[2] or address


def innermost(error: BaseException) -> str:
    """The innermost cause, which people know ('Connection refused'), where requests wraps it three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _path_of(address: str, name: str) -> Path | None:
    if address.startswith(("http://", "https://")):
        return None
    is_url = address.startswith("file://")
    path = Path(os.path.expanduser(url2pathname(urlsplit(address).path) if is_url else address))
    return path / name if path.is_dir() else path


def _close_late(opening: "futures.Future[requests.Response]") -> None:
    if not opening.exception():
        opening.result().close()
