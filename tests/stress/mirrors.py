"""Data under fire: processes that start at once on an empty folder, six mirrors of which four are useless, kills in
mid-download, disks that fill up.

    python tests/stress/mirrors.py [--processes N]

The archive is CIFAR-10's official layout in small, served on loopback.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_download as faults  # noqa: E402  (its servers that misbehave)

PER_FILE = 40  # images
SLOW_BYTES_PER_SECOND = 20_000
WHOLE_LINE = re.compile(r"^CIFAR-10 is complete and verified, from (.+)$", re.MULTILINE)
# What a process sees: the small archive in place of the published one, and impatience to match.
SETTING = """
import dataclasses, json, sys
from pathlib import Path
from lit_cifar import errors
from lit_cifar.data import archives, download, mirror
told = json.load(open(sys.argv.pop(1)))
archives.CIFAR10 = dataclasses.replace(archives.CIFAR10, num_bytes=told["num_bytes"], sha256=told["sha256"])
archives.ARCHIVES["cifar10"] = archives.CIFAR10
mirror.Limits.__init__.__defaults__ = tuple(told["limits"])
"""
FIT = (
    SETTING
    + """
from torchvision.datasets import CIFAR10
from lit_cifar import fit
from lit_cifar.cli import machine
for name in ("train_list", "test_list", "meta"):
    setattr(CIFAR10, name, told[name])
machine.run(fit.main)
"""
)
FETCH = (
    SETTING
    + """
def main(args):
    download.fetch_folder(Path(args[0]), archives.CIFAR10, args[1:])
errors.run(main)
"""
)
DECODE = (
    SETTING
    + """
from lit_cifar.data.tree import Tree
def main(args):
    print(Tree(Path(args[0])).read(True).images.sum().item())
errors.run(main)
"""
)
SMALL_RUN = ("--trainer.max_steps", "2", "--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu")


def official_archive() -> tuple[bytes, dict[str, object]]:
    """CIFAR-10's archive in small, and what DRIVER must know of it."""
    stream, draw = io.BytesIO(), np.random.default_rng(0)
    sums: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
            content: dict[str, object] = {"label_names": [f"class_{i}" for i in range(10)]}
            if name != "batches.meta":
                images = draw.integers(0, 256, (PER_FILE, 3072), np.uint8)
                content = {"data": images, "labels": [i % 10 for i in range(PER_FILE)]}
            data = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = stream.getvalue()
    lists = {
        attribute: [[name, sums[name]] for name, _ in getattr(CIFAR10, attribute)]
        for attribute in ("train_list", "test_list")
    }
    return data, {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        # as Limits has them: connect, stall, window, rate, report, quiet
        "limits": [2.0, 3.0, 0.5, 200e3, 5.0, 0.5],
        "meta": {**CIFAR10.meta, "md5": sums["batches.meta"]},
        **lists,
    }


class Fire:
    """An archive, the servers that give it badly, and the processes that want it; ends what it started."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.data, self.told = official_archive()
        (place / "told.json").write_text(json.dumps(self.told))
        self.servers: list[faults.Mirror] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.num_sent = 0  # bytes of the archive, over all servers

    def serve(self, stop: int | None = None, flip: int | None = None, bytes_per_second: float = 0) -> faults.Mirror:
        """A server of the archive's bytes up to `stop`, at this rate, with one of them flipped."""
        data = bytearray(self.data)
        if flip is not None:
            data[flip] ^= 1

        def reply(handler: faults.Handler) -> None:
            handler.head_for(handler.start, len(data))
            piece = max(1, int(bytes_per_second / 20)) if bytes_per_second else 2**16
            for begin in range(handler.start, stop or len(data), piece):
                sent = data[begin : min(begin + piece, stop or len(data))]
                handler.wfile.write(sent)
                self.num_sent += len(sent)
                if bytes_per_second and handler.server.released.wait(0.05):
                    return

        return self.answer(reply)

    def answer(self, reply: faults.Reply) -> faults.Mirror:
        server = faults.Mirror(reply)
        self.servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return server

    def start(self, code: str, *args: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.place / "told.json"), *map(str, args)],
            cwd=self.place,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "NO_PROXY": "127.0.0.1",
                "LIT_CIFAR_CACHE": str(self.place / "cache"),
                "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def __enter__(self) -> "Fire":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for server in self.servers:
            server.released.set()
            server.shutdown()
            server.server_close()

    def check_set(self, folder: Path) -> None:
        """The folder holds the data set, whole, and nothing half-written."""
        assert sorted(path.name for path in folder.iterdir()) == [
            ".cifar-10-python.tar.gz.lock",
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
        ]
        assert (folder / "cifar-10-python.tar.gz").read_bytes() == self.data
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        files = (folder / "cifar-10-batches-py").iterdir()
        assert {f"cifar-10-batches-py/{path.name}": path.read_bytes() for path in files} == members


def one_line(process: "subprocess.Popen[str]") -> str:
    """The line that a process ended with that could not work."""
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("lit_cifar: error: ")]
    assert process.returncode == 2, err
    assert err.splitlines()[-1:] == lines, err
    assert "Traceback" not in err
    return lines[0]


def six_mirrors(place: Path, num_processes: int = 8) -> str:
    """Processes start at once; one mirror of six is good, behind a redirect."""
    with Fire(place) as fire:
        good = fire.serve()
        mirrors = [
            fire.serve(stop=len(fire.data) // 2),
            fire.serve(flip=len(fire.data) * 3 // 4),
            fire.serve(bytes_per_second=SLOW_BYTES_PER_SECOND),
            fire.answer(faults.busy),
            fire.answer(faults.hang),
            fire.answer(lambda handler: handler.head(302, Location=good.url)),
        ]
        folder = place / "data"
        urls = json.dumps([mirror.url for mirror in mirrors])
        started_at = time.monotonic()
        flags = ("--data_dir", folder, "--data.mirrors", urls, *SMALL_RUN)
        processes = [fire.start(FIT, *flags) for _ in range(num_processes)]
        told = []
        for process in processes:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
            assert re.search(r"^Run: ", out, re.MULTILINE), out
            told.append(err)
        served = [line for err in told for line in WHOLE_LINE.findall(err)]
        assert served == [mirrors[-1].host], told
        assert sum("downloading CIFAR-10" in err for err in told) == 1, told
        fire.check_set(folder)
        runs = sorted(path.name for path in (place / "lightning_logs").iterdir())
        assert len(runs) == num_processes, runs
        assert len(good.starts) == 1
        return (
            f"{num_processes} processes trained on one download in {time.monotonic() - started_at:.0f} s; the servers "
            f"sent {fire.num_sent / len(fire.data):.2f} times the archive"
        )


def kills(place: Path, num_kills: int = 3) -> str:
    """kill -9 in mid-download, several times over: no byte is asked for twice."""
    with Fire(place) as fire:
        slow = fire.serve(bytes_per_second=400e3)
        folder = place / "data"
        part = folder / ".cifar-10-python.tar.gz.part"
        sizes = [0]
        for number in range(1, num_kills + 1):
            process = fire.start(FETCH, folder, slow.url)
            deadline = time.monotonic() + 60
            while not part.exists() or part.stat().st_size < number * len(fire.data) / (num_kills + 1):
                assert time.monotonic() < deadline
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            sizes.append(part.stat().st_size)
            assert not (folder / "cifar-10-python.tar.gz").exists()
            assert not (folder / "cifar-10-batches-py").exists()
        process = fire.start(FETCH, folder, slow.url)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert slow.starts == sizes, (slow.starts, sizes)
        fire.check_set(folder)
        return f"killed at {', '.join(map(str, sizes[1:]))} bytes of {len(fire.data)}: each time continued there"


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """`folder` as a file system of its own with so much room; gives what changes the room."""
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    mount(f"size={num_bytes}")
    try:
        yield lambda num_bytes: mount(f"remount,size={num_bytes}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(place: Path) -> str:
    """A disk that is full in mid-download, in mid-unpacking and in mid-decode: one line each, and then it goes on."""
    with Fire(place) as fire:
        good = fire.serve()
        size = len(fire.data)
        folder = place / "data"
        with small_disk(folder, size // 2) as resize:
            line = one_line(fire.start(FETCH, folder, good.url))
            assert f"no space left in {folder}, which needs {size} bytes for cifar-10-python.tar.gz" in line
            assert not (folder / "cifar-10-batches-py").exists()
            resize(size * 3 // 2)
            line = one_line(fire.start(FETCH, folder, good.url))
            assert f"no space left in {folder}, which needs" in line
            assert "to unpack cifar-10-python.tar.gz" in line
            left = sorted(path.name for path in folder.iterdir())
            assert left == [".cifar-10-python.tar.gz.lock", "cifar-10-python.tar.gz"], left
            resize(size * 4)
            process = fire.start(FETCH, folder, good.url)
            assert not process.wait(120), process.communicate()
            fire.check_set(folder)
            assert good.starts[0] == 0
            assert len(good.starts) == 2, "the download went on where the disk was full"
            assert good.starts[1] > size // 4
        images = image_archive(place / "images.tar")
        with small_disk(place / "cache", 40 * 3072) as resize:
            line = one_line(fire.start(DECODE, images))
            assert f"cannot write the cache folder {place / 'cache'} (No space left on device)" in line
            left = [path.name for path in (place / "cache").iterdir() if path.suffix != ".lock"]
            assert left == [], left
            # room for the decoded images, but not for the cache made of them
            resize(NUM_IMAGES * 3072 * 3 // 2)
            line = one_line(fire.start(DECODE, images))
            assert "No space left on device" in line
            resize(NUM_IMAGES * 3072 * 4)
            process = fire.start(DECODE, images)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert int(out) > 0
            left = sorted(path.suffix for path in (place / "cache").iterdir())
            assert left == [".lock", ".zip"], left
    return "a full disk in mid-download, mid-unpacking, mid-decode and mid-cache ends in one line and is got over"


NUM_IMAGES = 100


def image_archive(path: Path) -> Path:
    from PIL import Image

    draw = random.Random(0)
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_IMAGES):
            stream = io.BytesIO()
            Image.frombytes("RGB", (32, 32), draw.randbytes(3072)).save(stream, "PNG")
            split = "train" if number % 2 else "test"
            member = tarfile.TarInfo(f"{split}/class_{number % 4 // 2}/{number}.png")
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))
    return path


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    parts: list[Callable[[Path], str]] = [lambda place: six_mirrors(place, options.processes), kills]
    if can_mount():
        parts.append(full_disk)
    else:
        print("no full disk was tried: it needs root, to mount one")
    for part in parts:
        with tempfile.TemporaryDirectory() as place:
            print(part(Path(place)), flush=True)


if __name__ == "__main__":
    main()
