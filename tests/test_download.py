"""The download's invariants, against loopback servers that misbehave in every way we know."""

import contextlib
import errno
import hashlib
import io
import os
import random
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import filelock
import pytest

from lit_cifar.data import download
from lit_cifar.data.archives import ARCHIVES, Archive, unpack
from lit_cifar.data.download import fetch_folder
from lit_cifar.data.mirror import Limits
from lit_cifar.errors import UserError

LIMITS = Limits(
    connect_seconds=1.0,
    stall_seconds=1.5,
    window_seconds=0.3,
    bytes_per_second=200e3,
    report_seconds=0.2,
    quiet_seconds=0.1,
)
FILES = {f"batches/data_batch_{n}": random.Random(n).randbytes(40_000) for n in range(5)}


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


DATA = _archive()
HALF = len(DATA) // 2
FLIPPED = DATA[:100] + bytes([DATA[100] ^ 1]) + DATA[101:]
SPEC = Archive("SMALL", "small.tar.gz", len(DATA), hashlib.sha256(DATA).hexdigest(), "batches", ())
PART = f".{SPEC.name}.part"

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "Mirror"
    start = 0  # what Range asked for

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = int(asked[1]) if asked else 0
        self.server.starts.append(self.start)
        with contextlib.suppress(ConnectionError):
            self.server.reply(self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def head_for(self, start: int, num_bytes: int = len(DATA)) -> None:
        if start:
            content_range = f"bytes {start}-{num_bytes - 1}/{num_bytes}"
            self.head(206, Content_Range=content_range, Content_Length=num_bytes - start)
        else:
            self.head(200, Content_Length=num_bytes)

    def log_message(self, *args: object) -> None:
        pass


class Mirror(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.starts: list[int] = []  # of each request
        self.released = threading.Event()  # ends the replies that hang
        self.url = f"http://127.0.0.1:{self.server_port}/some/{SPEC.name}?download=1"
        self.host = f"127.0.0.1:{self.server_port}"


Serve = Callable[[Reply], Mirror]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirrors: list[Mirror] = []

    def start(reply: Reply) -> Mirror:
        mirror = Mirror(reply)
        mirrors.append(mirror)
        threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return mirror

    yield start
    for mirror in mirrors:
        mirror.released.set()
        mirror.shutdown()
        mirror.server_close()


def good(handler: Handler) -> None:
    handler.head_for(handler.start)
    handler.wfile.write(DATA[handler.start :])


def half(handler: Handler) -> None:
    handler.head_for(handler.start)
    handler.wfile.write(DATA[handler.start : HALF])


def third_each(handler: Handler) -> None:
    handler.head_for(handler.start)
    handler.wfile.write(DATA[handler.start : handler.start + len(DATA) // 3])


def flipped(handler: Handler) -> None:
    handler.head_for(handler.start)
    handler.wfile.write(FLIPPED[handler.start :])


def flipped_half(handler: Handler) -> None:
    handler.head_for(handler.start)
    handler.wfile.write(FLIPPED[handler.start : HALF])


def slow(handler: Handler) -> None:
    handler.head_for(handler.start)
    for start in range(handler.start, len(DATA), 5000):
        handler.wfile.write(DATA[start : start + 5000])
        time.sleep(0.05)


def stall(handler: Handler) -> None:
    half(handler)
    handler.server.released.wait(20)


def hang(handler: Handler) -> None:
    handler.server.released.wait(20)


def busy(handler: Handler) -> None:
    handler.send_error(503)


def no_ranges(handler: Handler) -> None:
    handler.head_for(0)
    handler.wfile.write(DATA)


def get(folder: Path, *mirrors: Mirror | str) -> Path:
    """Fetches, and checks what holds after every success."""
    addresses = [mirror if isinstance(mirror, str) else mirror.url for mirror in mirrors]
    fetch_folder(folder, SPEC, addresses, limits=LIMITS)
    path = folder / SPEC.name
    assert path.read_bytes() == DATA
    assert not (folder / PART).exists()
    return path


def put_part(folder: Path, content: bytes = DATA[:HALF]) -> None:
    (folder / PART).write_bytes(content)


def test_good_mirror_is_the_only_one_asked(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(good), serve(good)
    get(tmp_path / "new" / "folder", first, second)
    assert (first.starts, second.starts) == ([0], [])


def test_next_mirror_gives_only_the_rest_of_one_that_closed(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = serve(half), serve(good)
    get(tmp_path, first, second)
    assert (first.starts, second.starts) == ([0], [HALF])
    assert f"left {first.host}: " in capsys.readouterr().err


def test_closing_early_each_time_still_arrives(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(third_each)
    get(tmp_path, mirror)
    third = len(DATA) // 3
    assert mirror.starts[:3] == [0, third, 2 * third]


def test_closing_early_at_the_same_place_ends(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(half)
    with pytest.raises(UserError, match="no mirror delivered it") as caught:
        get(tmp_path, mirror)
    assert f"continue after {HALF} bytes" in str(caught.value)
    assert (tmp_path / PART).read_bytes() == DATA[:HALF]


def test_flipped_byte_is_thrown_away_and_its_mirror_not_asked_again(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    liar, closing, honest = serve(flipped), serve(half), serve(good)
    get(tmp_path, liar, closing, honest)
    assert (liar.starts, closing.starts, honest.starts) == ([0], [0], [HALF])
    assert f"left {liar.host}: its bytes have the wrong SHA-256" in capsys.readouterr().err


def test_flipped_byte_in_a_first_half_does_not_spoil_a_good_mirror(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    liar, honest = serve(flipped_half), serve(good)
    get(tmp_path, liar, honest)
    assert honest.starts == [HALF, 0]
    wrong = next(line for line in capsys.readouterr().err.splitlines() if "wrong SHA-256" in line)
    assert liar.host in wrong
    assert honest.host in wrong


def test_wrong_part_of_an_earlier_run_is_replaced(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(good)
    put_part(tmp_path, FLIPPED[:HALF])
    get(tmp_path, mirror)
    assert mirror.starts == [HALF, 0]


@pytest.mark.parametrize("content", [FLIPPED, DATA + b"more"], ids=["flipped", "too long"])
def test_whole_but_wrong_part_of_an_earlier_run_is_replaced(serve: Serve, tmp_path: Path, content: bytes) -> None:
    mirror = serve(good)
    put_part(tmp_path, content)
    get(tmp_path, mirror)
    assert mirror.starts == [0]


def test_whole_part_of_an_earlier_run_needs_no_mirror(tmp_path: Path) -> None:
    put_part(tmp_path, DATA)
    fetch_folder(tmp_path, SPEC, [])
    assert (tmp_path / SPEC.name).read_bytes() == DATA


def test_liars_only_leave_nothing_behind(serve: Serve, tmp_path: Path) -> None:
    liars = [serve(flipped), serve(flipped_half), serve(flipped)]
    with pytest.raises(UserError, match=r"no mirror delivered it .*wrong SHA-256") as caught:
        get(tmp_path, *liars)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / SPEC.name).exists()


def test_slow_mirror_is_left_for_the_next(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = serve(slow), serve(good)
    get(tmp_path, first, second)
    assert second.starts[0] > 0
    assert re.search(rf"left {first.host}: slow: \d+ kB/s", capsys.readouterr().err)


def test_slow_mirror_is_good_enough_where_no_other_delivers(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = serve(slow), serve(busy)
    get(tmp_path, first, second)
    assert len(first.starts) == 2
    assert first.starts[1] > 0
    err = capsys.readouterr().err
    assert re.search(r"\d+% of SMALL, \d\.\d\d MB/s, \d+ s left", err)
    assert f"complete and verified, from {first.host}" in err


def test_fast_mirror_that_closes_goes_before_a_slow_one(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(slow), serve(third_each)
    get(tmp_path, first, second)
    assert len(first.starts) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(busy, "answered 503"), (hang, "no answer in 1 s"), (stall, "timed out")],
    ids=["503", "hang", "stall"],
)
def test_useless_mirror_is_left_for_the_next(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply, reason: str
) -> None:
    first, second = serve(reply), serve(good)
    started_at = time.monotonic()
    get(tmp_path, first, second)
    assert time.monotonic() - started_at < 5
    assert f"left {first.host}: {reason}" in capsys.readouterr().err


def test_mirror_that_is_slow_to_answer_is_good_enough_alone(serve: Serve, tmp_path: Path) -> None:
    def late_once(handler: Handler) -> None:
        if len(handler.server.starts) == 1:
            time.sleep(1.2)
        good(handler)

    mirror = serve(late_once)
    get(tmp_path, mirror)
    assert mirror.starts == [0, 0]


def test_range_survives_a_redirect(serve: Serve, tmp_path: Path) -> None:
    target = serve(good)
    source = serve(lambda handler: handler.head(302, Location=target.url))
    put_part(tmp_path)
    get(tmp_path, source)
    assert target.starts == [HALF]


def test_server_that_ignores_range_is_not_appended(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(no_ranges)
    put_part(tmp_path)
    get(tmp_path, mirror)
    assert mirror.starts == [HALF]


def test_server_that_answers_an_earlier_range_is_not_appended(serve: Serve, tmp_path: Path) -> None:
    def earlier(handler: Handler) -> None:
        handler.head_for(handler.start - 1000)
        handler.wfile.write(DATA[handler.start - 1000 :])

    mirror = serve(earlier)
    put_part(tmp_path)
    get(tmp_path, mirror)
    assert mirror.starts == [HALF]


def test_server_that_answers_a_later_range_is_left(serve: Serve, tmp_path: Path) -> None:
    def later(handler: Handler) -> None:
        handler.head_for(handler.start + 1)
        handler.wfile.write(DATA[handler.start + 1 :])

    first, second = serve(later), serve(good)
    put_part(tmp_path)
    get(tmp_path, first, second)
    assert second.starts == [HALF]


def test_server_without_that_range_is_asked_for_the_whole(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(lambda handler: handler.head(416) if handler.start else good(handler))
    put_part(tmp_path)
    get(tmp_path, mirror)
    assert mirror.starts == [HALF, 0]


def test_other_file_is_refused_before_its_bytes_come(serve: Serve, tmp_path: Path) -> None:
    def other(handler: Handler) -> None:
        handler.head_for(handler.start, len(DATA) + 1)
        handler.wfile.write(b"?" * HALF)

    def page(handler: Handler) -> None:
        handler.head(200, Content_Type="text/html; charset=utf-8")
        handler.wfile.write(b"<html>Please log in")

    third = serve(good)
    get(tmp_path, serve(other), serve(page), third)
    assert third.starts == [0]


def test_longer_body_is_not_written(serve: Serve, tmp_path: Path) -> None:
    def longer(handler: Handler) -> None:
        handler.head(200)
        handler.wfile.write(DATA + b"more")

    get(tmp_path, serve(longer))


@pytest.mark.parametrize("form", ["folder", "file", "file url", "folder url"])
def test_local_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    folder = tmp_path / "a mirror"
    folder.mkdir()
    file = folder / SPEC.name
    file.write_bytes(DATA)
    mirror = {"folder": str(folder), "file": str(file), "file url": file.as_uri(), "folder url": folder.as_uri()}[form]
    target = tmp_path / "target"
    target.mkdir()
    put_part(target)
    get(target, str(tmp_path / "absent"), mirror)
    assert "wrong SHA-256" not in capsys.readouterr().err


def test_good_archive_is_used_without_a_request(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(good)
    (tmp_path / SPEC.name).write_bytes(DATA)
    get(tmp_path, mirror)
    assert mirror.starts == []


@pytest.mark.parametrize("content", [DATA[:HALF], FLIPPED], ids=["cut short", "flipped"])
def test_bad_archive_is_named_and_left_alone(serve: Serve, tmp_path: Path, content: bytes) -> None:
    mirror = serve(good)
    path = tmp_path / SPEC.name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        fetch_folder(tmp_path, SPEC, [mirror.url], limits=LIMITS)
    for words in (str(path), f"{len(content)} bytes", f"expected {len(DATA)}", "delete it and start again"):
        assert words in str(caught.value)
    assert path.read_bytes() == content
    assert mirror.starts == []
    assert not (tmp_path / SPEC.folder).exists()


def test_folder_is_made_once_and_then_needs_nothing(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(good)
    for _ in range(2):
        folder = fetch_folder(tmp_path, SPEC, [mirror.url], limits=LIMITS)
        assert folder == tmp_path / SPEC.folder
        assert {f"{SPEC.folder}/{path.name}": path.read_bytes() for path in folder.iterdir()} == FILES
        (tmp_path / SPEC.name).unlink(missing_ok=True)
        (tmp_path / f".{SPEC.name}.lock").unlink(missing_ok=True)
    assert mirror.starts == [0]
    fetch_folder(tmp_path, SPEC, [])
    assert [path.name for path in tmp_path.iterdir()] == [SPEC.folder]  # the folder may be one that cannot be written


def test_unpack_verifies_first(tmp_path: Path) -> None:
    archive = tmp_path / "given.tar.gz"
    archive.write_bytes(FLIPPED)
    with pytest.raises(UserError, match=r"given\.tar\.gz is not the published archive"):
        unpack(archive, tmp_path, SPEC)
    assert not (tmp_path / SPEC.folder).exists()
    archive.write_bytes(DATA)
    assert unpack(archive, tmp_path, SPEC) == tmp_path / SPEC.folder
    assert unpack(archive, tmp_path, SPEC) == tmp_path / SPEC.folder  # somebody was faster


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_interrupted_unpacking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def extract(tar: tarfile.TarFile, path: Path, **kwargs: object) -> None:
        (path / SPEC.folder).mkdir(parents=True)
        raise error

    archive = tmp_path / SPEC.name
    archive.write_bytes(DATA)
    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        unpack(archive, tmp_path, SPEC)
    if isinstance(error, OSError):
        needed = int(re.findall(rf"no space left in {tmp_path}, which needs (\d+) bytes", str(caught.value))[0])
        assert needed >= 5 * 40_000
    assert {path.name for path in tmp_path.iterdir()} == {SPEC.name, f".{SPEC.name}.lock"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_interrupted_download_is_continued(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    mirror = serve(good)

    def write(fd: int, data: bytes) -> None:
        os.write(fd, data[:1000])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", write)
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            fetch_folder(tmp_path, SPEC, [mirror.url], limits=LIMITS)
    if isinstance(error, OSError):
        assert f"no space left in {tmp_path}, which needs {len(DATA)} bytes" in str(caught.value)
    assert (tmp_path / PART).read_bytes() == DATA[:1000]
    assert not (tmp_path / SPEC.name).exists()
    assert not (tmp_path / SPEC.folder).exists()
    fetch_folder(tmp_path, SPEC, [mirror.url], limits=LIMITS)
    assert mirror.starts == [0, 1000]


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.touch()
    with pytest.raises(UserError, match=f"cannot work in {folder}: "):
        fetch_folder(folder, SPEC, [])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere; Windows has no modes")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"cannot work in {tmp_path}: Permission denied"):
        fetch_folder(tmp_path, SPEC, [])
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def acquire(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match=f"{tmp_path}.* lock"):
        fetch_folder(tmp_path, SPEC, [])


def test_waiting_is_said_once_and_then_finds_it_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = threading.Event()

    def hold() -> None:
        with filelock.FileLock(tmp_path / f".{SPEC.name}.lock"):
            held.set()
            time.sleep(0.5)
            (tmp_path / SPEC.folder).mkdir()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert fetch_folder(tmp_path, SPEC, [], limits=LIMITS) == tmp_path / SPEC.folder
    thread.join()
    assert capsys.readouterr().err.count("waiting for another process") == 1


def start_process(folder: Path, mirror: Mirror) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from lit_cifar.data.archives import Archive
from lit_cifar.data.download import fetch_folder
print(fetch_folder(Path({str(folder)!r}), {SPEC!r}, [{mirror.url!r}]))
"""
    root = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)


def test_processes_at_once_make_one_download(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(slow)  # two seconds, so that all are there before it ends
    processes = [start_process(tmp_path, mirror) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=20)[0].strip() == str(tmp_path / SPEC.folder)
        assert process.returncode == 0
    assert mirror.starts == [0]


def test_killed_download_is_continued(serve: Serve, tmp_path: Path) -> None:
    mirror = serve(lambda handler: good(handler) if handler.start else stall(handler))
    with start_process(tmp_path, mirror) as process:
        deadline = time.monotonic() + 15
        while not (tmp_path / PART).exists() or (tmp_path / PART).stat().st_size < HALF:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()  # SIGKILL
    assert not (tmp_path / SPEC.name).exists()
    get(tmp_path, mirror)
    assert mirror.starts == [0, HALF]


def closed_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


def test_no_network_names_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    host = closed_port()
    with pytest.raises(UserError) as caught:
        fetch_folder(tmp_path, SPEC, [f"http://{closed_port()}/a", f"http://name:secret@{host}/a"])
    assert str(caught.value) == (
        f"SMALL is not in {tmp_path} and no mirror could be reached (last: {host}: Connection refused); "
        f"put small.tar.gz into {tmp_path}, or name your data with data_dir=..., or try `make demo` "
        "(embedded data, no download)"
    )


@pytest.mark.parametrize("spec", ARCHIVES.values(), ids=lambda spec: spec.title)
def test_resolver_that_hangs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Archive) -> None:
    released = threading.Event()

    def hang_resolver(*args: object, **kwargs: object) -> None:
        released.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang_resolver)
    limits = Limits(connect_seconds=0.2)
    started_at = time.monotonic()
    with pytest.raises(UserError, match=r"no mirror could be reached \(last: www\.cs\.toronto\.edu: no answer in 0"):
        fetch_folder(tmp_path, replace(SPEC, mirrors=spec.mirrors), limits=limits)
    seconds = time.monotonic() - started_at
    released.set()
    assert seconds < 0.2 * (len(spec.mirrors) + 0.5) + 1
    assert Limits().connect_seconds * (len(spec.mirrors) + 0.5) < 28  # of the 30 s that the defaults promise


def test_all_busy_is_not_called_unreachable(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(busy), serve(busy)
    with pytest.raises(UserError) as caught:
        get(tmp_path, first, second)
    assert f"no mirror delivered it ({first.host}: answered 503 Service Unavailable; {second.host}: " in str(
        caught.value
    )


def test_lines_without_control_codes_where_stderr_is_no_terminal(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = serve(half), serve(good)
    get(tmp_path, first, second)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"[^\n -~]", captured.err) is None
    assert captured.err.splitlines() == [
        f"downloading SMALL (0 MB) from {first.host}",
        f"left {first.host}: {captured.err.split(': ')[1].splitlines()[0]}",
        f"downloading SMALL (0 MB) from {second.host}, continued after {HALF} bytes",
        f"SMALL is complete and verified, from {second.host}",
    ]


def test_bar_where_stderr_is_a_terminal(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    mirror = serve(good)
    get(tmp_path, mirror)
    assert f"\rSMALL from {mirror.host}: 100%" in terminal.getvalue()


def test_an_archives_own_mirrors_are_asked_where_none_are_named(serve: Serve, tmp_path: Path) -> None:
    own, named = serve(good), serve(good)
    spec = replace(SPEC, mirrors=(own.url,))
    fetch_folder(tmp_path / "a", spec, [named.url], limits=LIMITS)
    assert (own.starts, named.starts) == ([], [0])
    fetch_folder(tmp_path / "b", spec, limits=LIMITS)
    assert (own.starts, named.starts) == ([0], [0])


@pytest.mark.parametrize(
    ("dataset", "num_bytes", "title"), [("cifar10", 170_498_071, "CIFAR-10"), ("cifar100", 169_001_437, "CIFAR-100")]
)
def test_the_published_archives(dataset: str, num_bytes: int, title: str) -> None:
    spec = ARCHIVES[dataset]
    assert (spec.num_bytes, spec.title) == (num_bytes, title)
    assert len(spec.sha256) == 64
    assert len(set(spec.mirrors)) == len(spec.mirrors) >= 5
    assert "cs.toronto.edu" in spec.mirrors[-1]
    assert all(mirror.startswith("https://") and f"/{spec.name}" in mirror for mirror in spec.mirrors)
