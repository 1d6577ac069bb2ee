"""The cache of decoded images: where it lies, who writes it, and how it is read. What is decoded is in tree.py.

A cache file is a zip, stored, of header.json and the bytes of train and test; its CRCs show damage.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch

from lit_cifar.data.images import IMAGE_BYTES
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError
from lit_cifar.files import local_path, move

T = TypeVar("T")

CACHE_FORMAT = 2  # raise it whenever the same files would give other pixels or another layout
SPLITS = ("train", "test")


class Decoded(NamedTuple):
    """The order of the images that `decode` wrote into the spool, IMAGE_BYTES (3, 32, 32) each."""

    classes: tuple[str, ...]
    num_per_class: dict[str, list[int]]  # by split, one number for each class
    positions: dict[str, list[int]]  # by split, class by class: which image of the spool comes next
    left_out: dict[str, tuple[int, str]]  # what was not decoded: LeftOut.found


def cache_dir() -> Path:
    """Where decoded trees and unpacked archives are kept: $LIT_CIFAR_CACHE, or the system's folder for caches.

    Raises:
        UserError: the variable holds a URL.
    """
    import platformdirs

    chosen = os.environ.get("LIT_CIFAR_CACHE")
    return local_path(chosen, "LIT_CIFAR_CACHE") if chosen else Path(platformdirs.user_cache_dir("lit_cifar"))


def fingerprint(facts: Iterable[str]) -> str:
    """A short name for `facts` about the files that were decoded: other facts, or another CACHE_FORMAT, change it."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    for fact in facts:  # one by one: those of a million files take 0.2 GB together
        digest.update(f"\n{fact}".encode())
    return digest.hexdigest()


def cached(source: Path, wanted: str, read: Callable[[Path], T], decode: Callable[[IO[bytes]], Decoded]) -> T:
    """What `read` gives of the cache file of `source`, after decoding if the file is not there or cannot be read.

    However many processes call this at once, one decodes and the others wait.

    Args:
        source: the tree or archive.
        wanted: the fingerprint of its files as they are now.
        read: raises anything when the file does not do.
        decode: writes the images into a spool.

    Raises:
        UserError: the cache folder cannot be written; and what `decode` raises.
    """
    from filelock import FileLock

    key = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    file = cache_dir() / f"tree-{key}.zip"
    # Whatever is wrong with the cache, damage included, the cure is the same: decode again.
    with contextlib.suppress(Exception):
        return read(file)
    with _needs_cache_folder(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"))
        lock.acquire()
    try:
        with contextlib.suppress(Exception):  # another process may have decoded while this one waited
            return read(file)
        # Decoded images wait on the disk: with CIFAR-10's in memory a run peaked at 1.03 GB here, now at 0.85.
        # around it all: on a full disk, closing the spool writes what is left of it and fails once more
        with _needs_cache_folder(file.parent), tempfile.TemporaryFile(dir=file.parent) as spool:
            _write(file, wanted, decode(spool), spool)
        return read(file)
    finally:
        lock.release()


@contextlib.contextmanager
def _needs_cache_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the cache folder {folder} ({error.strerror or type(error).__name__}); "
            "set LIT_CIFAR_CACHE to a folder that can be written"
        ) from error


def _write(file: Path, wanted: str, decoded: Decoded, spool: IO[bytes]) -> None:
    header = {
        **{"fingerprint": wanted, "classes": decoded.classes, "left_out": decoded.left_out},
        **decoded.num_per_class,
    }
    temporary = file.with_suffix(".tmp")  # one name is enough under the lock, and a killed run leaves no second one
    with open(temporary, "wb") as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("header.json", json.dumps(header))
            for split in SPLITS:
                with archive.open(split, "w", force_zip64=True) as member:
                    for position in decoded.positions[split]:
                        spool.seek(position * IMAGE_BYTES)
                        member.write(spool.read(IMAGE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
    move(temporary, file)


def read_header(file: Path, wanted: str | None) -> dict[str, Any]:
    """The header of a cache file: its "classes", for each split the number of images of each class, and "left_out".

    Raises:
        Exception: of many kinds, when the file is missing or damaged, or has another fingerprint than `wanted`.
    """
    with zipfile.ZipFile(file) as archive:
        header: dict[str, Any] = json.loads(archive.read("header.json"))
    if wanted is not None and header["fingerprint"] != wanted:
        raise ValueError("the files have changed")
    return header


def read_split(file: Path, wanted: str | None, train: bool) -> Split:
    """The training or test images of a cache file; raises what `read_header` raises."""
    header = read_header(file, wanted)
    split = "train" if train else "test"
    images = np.empty((sum(header[split]), 3, 32, 32), np.uint8)
    rows = images.reshape(-1)
    with zipfile.ZipFile(file) as archive, archive.open(split) as member:
        for start in range(0, len(rows), 2**24):  # not at once, or there would be two copies
            rows[start : start + 2**24] = np.frombuffer(member.read(2**24), np.uint8)
    labels = torch.repeat_interleave(torch.tensor(header[split]))
    return Split(torch.from_numpy(images), labels, tuple(header["classes"]))
