"""What several test files share: flags, readers of a run's files, and makers of data and images. Fixtures are in
conftest.py, callbacks that break a run in faults.py."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100

from lit_cifar.data import shapes
from lit_cifar.data.archives import ARCHIVES
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# CIFAR-10 as an archive of JPEG images, where there is one to test on
JPEG = Path(os.environ.get("LIT_CIFAR_JPEG") or ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.xz")
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of a command: the package and faults.py
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # conftest.py's run_command
SHAPES = ["--dataset", "shapes", "--accelerator", "cpu"]
SHORT = [*SHAPES, "--batch_size", "32", "--max_epochs", "1", "--lr", "0.05"]
LABELS = {"cifar10": [(i * 7 + 3) % 10 for i in range(10)], "cifar100": [99 - 11 * i for i in range(10)]}


# ---- what a command says and writes ----


def error_of(function: Callable[..., object], *args: Any) -> str:
    """The message of the UserError that a call ends in, which is one line."""
    with pytest.raises(UserError) as raised:
        function(*args)
    assert str(raised.value).isprintable(), "a user error is one line"
    return str(raised.value)


@contextmanager
def followed(module: str, *args: object) -> Iterator["subprocess.Popen[str]"]:
    """`python -m MODULE ARGS` in this folder, whose output the caller reads as it comes; killed in the end."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# A run is given by its name in lightning_logs, or by its absolute path.


def results(run: str | Path) -> dict[str, Any]:
    return json.loads(Path("lightning_logs", run, "results.json").read_text())


def scalars(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, without the run's speed, which no two runs share."""
    events = EventAccumulator(str(Path("lightning_logs", run)), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("speed/")
    }


def weights(run: str | Path, name: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(Path("lightning_logs", run, "checkpoints", f"{name}.ckpt"), weights_only=True)
    return checkpoint["state_dict"]


def assert_same_run(one: str, other: str) -> None:
    """Weights, losses and figures are identical to the bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert scalars(one) == scalars(other)
    ignored = ("seconds", "peak_memory", "commit", "when", "recipe")  # one may be started from the other's config
    assert {k: v for k, v in results(one).items() if k not in ignored} == {
        k: v for k, v in results(other).items() if k not in ignored
    }


# ---- data and images ----


def pixels(*key: str) -> np.ndarray:
    """A random image (32, 32, 3) uint8 of its own for each name."""
    seed = int(hashlib.sha256("/".join(key).encode()).hexdigest()[:8], 16)
    return np.random.RandomState(seed).randint(0, 256, (32, 32, 3)).astype(np.uint8)


def make_tree(folder: Path, class_names: tuple[str, ...], num_images: int = 4) -> Path:
    """A tree of images in `folder`, so many for each class and split."""
    for split in ("train", "test"):
        for class_name in class_names:
            (folder / split / class_name).mkdir(parents=True)
            for index in range(num_images):
                Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / split / class_name / f"{index}.png")
    return folder


class OldDtype:
    def __reduce__(self) -> tuple[object, ...]:
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class OldArray:
    """Pickled as in 2009."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[object, ...]:
        reduced = self.array.__reduce__()
        return reduced[0], reduced[1], (1, self.array.shape, OldDtype(), False, self.array.tobytes())


def write_official(folder: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images a file in the dataset's official layout; torchvision is told their checksums."""
    reader = CIFAR100 if dataset == "cifar100" else CIFAR10
    files = folder / ARCHIVES[dataset].folder
    files.mkdir(parents=True)

    def write(name: str, content: object) -> list[str]:
        data = pickle.dumps(content, protocol=2)
        (files / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str) -> list[str]:
        data = OldArray(np.stack([pixels(name, str(i)).transpose(2, 0, 1).ravel() for i in range(10)]))
        if dataset == "cifar10":
            return write(name, {"data": data, "labels": LABELS[dataset]})
        return write(name, {"data": data, "fine_labels": LABELS[dataset], "coarse_labels": [i % 3 for i in range(10)]})

    names = [f"class_{i}" for i in range(max(LABELS[dataset]) + 1)]
    content = {"label_names": names} if dataset == "cifar10" else {"fine_label_names": names, "coarse_label_names": []}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(reader, attribute, [batch(name) for name, _ in getattr(reader, attribute)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": write(reader.meta["filename"], content)[1]})
    return files


def bomb(side: int) -> bytes:
    """A black PNG of side x side pixels, a thousandth of their size."""
    rows, packer = bytes(1 + side // 8) * 1000, zlib.compressobj(1)
    packed = b"".join(packer.compress(rows) for _ in range(side // 1000)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@contextmanager
def disk_with_room_for(num_bytes: int) -> Iterator[None]:
    """Writing a file beyond so many bytes fails, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def draw_few(monkeypatch: pytest.MonkeyPatch, num_train: int, num_test: int) -> None:
    """Has the data set of shapes draw no more images than these."""
    draw = shapes.draw_shapes

    def draw_some(train: bool) -> Split:
        split, num_images = draw(train), num_train if train else num_test
        return replace(split, images=split.images[:num_images], labels=split.labels[:num_images])

    monkeypatch.setattr(shapes, "draw_shapes", draw_some)


class Asking(nn.Linear):
    """A net that asks for training images to begin with, and keeps them."""

    images: Tensor | None = None

    def init_from_images(self, images: Tensor) -> None:
        self.images = images

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mean((2, 3)))
