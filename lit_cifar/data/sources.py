"""Turns CIFAR's official files, image trees, archives and drawn shapes into a checked `Split`. Batches are loader's."""

import contextlib
import functools
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_cifar import log
from lit_cifar.data import shapes
from lit_cifar.data.download import ARCHIVES
from lit_cifar.errors import UserError
from lit_cifar.text import printable

T = TypeVar("T")
R = TypeVar("R")

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
SPLITS = ("train", "test")
# by which a folder that was renamed is known
OFFICIAL_FILES = {"cifar10": ("data_batch_1",), "cifar100": ("train", "meta")}
IMAGE_BYTES = 3 * 32 * 32
MAX_MEMBER_BYTES = 64 * 2**20
MAX_PIXELS = 2**26  # of one image: decoding 100 million with transparency takes 0.9 GB in each thread
MAX_NAME_BYTES = 2**20
# tar's members that hold the name and properties of the next
NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
CACHE_FORMAT = 1  # raise it whenever the same files would give other pixels or another layout
# From here on decoding goes to threads. PIL holds the GIL for all but the pixel work: two threads take 1.7x as long
# as one for 32x32 JPEGs (0.9 KB), 0.8x at 15 KB and 0.5x at 55 KB (2 cores, Pillow 13.0, Python 3.11).
THREADED_BYTES = 16 * 2**10


@dataclass(frozen=True)
class Split:
    """One half of a data set, checked when made: ValueError unless shapes, dtypes and the label range are right."""

    images: Tensor  # (N, 3, 32, 32) uint8 0..255, contiguous
    labels: Tensor  # (N,) int64, 0..K-1
    classes: tuple[str, ...]  # K names; labels index into them

    def __post_init__(self) -> None:
        num_images, num_classes = len(self.labels), len(self.classes)
        if self.images.shape != (num_images, 3, 32, 32) or self.labels.shape != (num_images,):
            raise ValueError(f"images {tuple(self.images.shape)} and labels {tuple(self.labels.shape)} do not match")
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise ValueError(f"images are {self.images.dtype}, labels {self.labels.dtype}; want uint8 and int64")
        if not self.images.is_contiguous():
            raise ValueError("images are not contiguous")
        if num_images and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < num_classes:
            raise ValueError(f"labels go beyond 0..{num_classes - 1}")


def find_source(data_dir: Path, dataset: str) -> Literal["official", "official-archive", "tree", "archive", "nothing"]:
    """What `data_dir` holds for a dataset of `download.ARCHIVES`, 'cifar10' or 'cifar100'.

    "official" is the dataset's unpacked files (the folder itself or the one above), "official-archive" its tar.gz,
    "tree" a folder with train/ and test/, "archive" a file named as one that `read_tree` can open, "nothing" a folder
    with none of these or that does not exist. Raises UserError for half a tree, a file that is no archive, an archive
    that does not exist, and the official archive of another dataset.
    """
    if data_dir.is_dir():
        if _official_folder(data_dir, dataset) is not None:
            return "official"
        present = [name for name in SPLITS if (data_dir / name).is_dir()]
        if len(present) == 1:
            missing = "test" if present == ["train"] else "train"
            raise UserError(f"{data_dir} has a folder {present[0]}/ but no {missing}/: add {missing}/<class>/<image>")
        return "tree" if present else "nothing"
    named_as_archive = data_dir.name.lower().endswith(ARCHIVE_SUFFIXES)
    if data_dir.exists():
        published = _published_in(data_dir)
        if published == dataset:
            return "official-archive"
        if published is not None:
            raise UserError(other_dataset(data_dir, published, dataset))
        if named_as_archive:
            return "archive"
        raise UserError(f"{data_dir} is neither a folder nor an archive; looked for {', '.join(ARCHIVE_SUFFIXES)}")
    if named_as_archive:
        raise UserError(
            f"there is no archive {data_dir}; check the path, or give a folder to download {ARCHIVES[dataset].title} "
            "into"
        )
    return "nothing"


def find_dataset(folder: Path) -> str | None:
    """The dataset of `download.ARCHIVES` whose files or whose archive a folder holds, if any."""
    for dataset, spec in ARCHIVES.items():
        if _official_folder(folder, dataset) is not None or (folder / spec.name).is_file():
            return dataset
    return None


def other_dataset(path: Path, found: str, wanted: str) -> str:
    """The one line about a path that holds another dataset than was asked for."""
    return (
        f"{path} holds {ARCHIVES[found].title}, not {ARCHIVES[wanted].title}: add --dataset {found}, or name other "
        "data with --data_dir"
    )


def _official_folder(folder: Path, dataset: str) -> Path | None:
    unpacked = folder / ARCHIVES[dataset].folder
    if unpacked.is_dir():
        return unpacked
    return folder if all((folder / name).is_file() for name in OFFICIAL_FILES[dataset]) else None


def _published_in(path: Path) -> str | None:
    # A damaged archive must not pass for "none of them" by raising here: its name decides then.
    with (
        contextlib.suppress(OSError, EOFError, tarfile.TarError),
        tarfile.open(path, "r:gz", tarinfo=_StrictTarInfo) as tar,
    ):
        first = tar.next()
        for dataset, spec in ARCHIVES.items():
            if first is not None and PurePosixPath(first.name).parts[:1] == (spec.folder,):
                return dataset
    return None


def read_official(folder: Path, dataset: str, train: bool) -> Split:
    """The official 50,000 training or 10,000 test images of 'cifar10' or 'cifar100' in the official order.

    CIFAR-100's labels are the fine ones, of 100 classes. `folder` holds the unpacked archive's folder or is it. Raises
    UserError naming the first file that is missing or whose MD5 sum is wrong; no pickle is opened before all sums are
    right.
    """
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    files = _official_folder(folder, dataset)
    if files is None:
        raise UserError(f"{folder} does not hold {ARCHIVES[dataset].folder}/; give the folder that does")
    reader = CIFAR100 if dataset == "cifar100" else CIFAR10
    sums = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
    for name, md5 in sums:
        if not (files / name).is_file():
            raise UserError(f"{files / name} is missing; delete {files} and start again")
        if not check_integrity(str(files / name), md5):
            raise UserError(f"{files / name} does not match its checksum (damaged?); delete {files} and start again")

    class Renamed(reader):  # type: ignore[misc, valid-type]
        base_folder = ""  # the folder may have been renamed

    data = Renamed(str(files), train=train, download=False)
    images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return Split(torch.from_numpy(images), torch.tensor(data.targets, dtype=torch.int64), tuple(data.classes))


def draw_shapes(train: bool) -> Split:
    """The embedded data set: 10,000 training or 2,000 test drawings, ten balanced classes, the same on any machine."""
    images, labels = shapes.draw(train)
    return Split(torch.from_numpy(images), torch.from_numpy(labels), shapes.CLASSES)


def read_tree(path: Path, train: bool) -> Split:
    """The images of a tree train/<class>/* and test/<class>/*, or of one archive of such a tree.

    Classes are the sorted folder names; images stand class by class, in sorted name order. JPEG, PNG and WebP are
    read; all become RGB, upright by their EXIF, and 32x32. The first call decodes and writes a cache under
    `cache_dir()`; later ones read that in no time until a file changes. Raises UserError, in one line, for an image or
    an archive that cannot be read, an empty class, classes that differ between train and test, no images at all, and
    a cache folder that cannot be written.
    """
    return _cached(path, lambda file, fingerprint: _read_cache(file, fingerprint, train))


def prepare_tree(path: Path) -> Path:
    """Decode what `read_tree` reads unless the cache is there and fresh. However many processes call, one decodes.

    Returns the cache file, for `read_prepared`.
    """

    def check(file: Path, fingerprint: str) -> Path:
        _read_header(file, fingerprint)
        return file

    return _cached(path, check)


def read_prepared(file: Path, train: bool) -> Split:
    """What `read_tree` gives, from the cache file that `prepare_tree` just returned, without listing the tree again.

    Listing 60,000 files takes 0.3 to 0.5 s. Raises OSError, ValueError and the like when the file went or is damaged.
    """
    return _read_cache(file, None, train)


def prepared_classes(file: Path) -> tuple[str, ...]:
    """The names of the K classes, from the cache file that `prepare_tree` just returned."""
    return tuple(_read_header(file, None)["classes"])


def cache_dir() -> Path:
    """Where decoded trees are kept: $LIT_CIFAR_CACHE, or the system's folder for caches."""
    import platformdirs

    chosen = os.environ.get("LIT_CIFAR_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("lit_cifar"))


# ---- the cache: one zip, stored, of header.json and the bytes of train and test; its CRCs show damage ----


def _cached(path: Path, read: Callable[[Path, str], T]) -> T:
    """`read(cache file, fingerprint)`, after decoding `path` if that failed. Decodes under a lock."""
    from filelock import FileLock

    source = _source(path)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    file = cache_dir() / f"tree-{key}.zip"
    # Whatever is wrong with the cache, damage included, the cure is the same: decode again.
    with contextlib.suppress(Exception):
        return read(file, source.fingerprint)
    with _needs_cache_folder(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"))
        lock.acquire()
    try:
        with contextlib.suppress(Exception):  # another process may have decoded while this one waited
            return read(file, source.fingerprint)
        # Decoded images wait on the disk: with CIFAR-10's in memory a run peaked at 1.03 GB here, now at 0.85.
        # around it all: on a full disk, closing the spool writes what is left of it and fails once more
        with _needs_cache_folder(file.parent), tempfile.TemporaryFile(dir=file.parent) as spool:
            header, positions = _decode(source, spool)
            _write_cache(file, header, positions, spool)
        return read(file, source.fingerprint)
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


def _write_cache(file: Path, header: dict[str, Any], positions: "dict[Key, int]", spool: IO[bytes]) -> None:
    temporary = file.with_suffix(".tmp")  # one name is enough under the lock, and a killed run leaves no second one
    with open(temporary, "wb") as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("header.json", json.dumps(header))
            for split in SPLITS:
                with archive.open(split, "w", force_zip64=True) as member:
                    for key in sorted(key for key in positions if key.split == split):
                        spool.seek(positions[key] * IMAGE_BYTES)
                        member.write(spool.read(IMAGE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _read_header(file: Path, fingerprint: str | None) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        header: dict[str, Any] = json.loads(archive.read("header.json"))
    if fingerprint is not None and header["fingerprint"] != fingerprint:
        raise ValueError("the source has changed")
    return header


def _read_cache(file: Path, fingerprint: str | None, train: bool) -> Split:
    header = _read_header(file, fingerprint)
    split = "train" if train else "test"
    images = np.empty((sum(header[split]), 3, 32, 32), np.uint8)
    rows = images.reshape(-1)
    with zipfile.ZipFile(file) as archive, archive.open(split) as member:
        for start in range(0, len(rows), 2**24):  # not at once, or there would be two copies
            rows[start : start + 2**24] = np.frombuffer(member.read(2**24), np.uint8)
    labels = torch.repeat_interleave(torch.tensor(header[split]))
    return Split(torch.from_numpy(images), labels, tuple(header["classes"]))


# ---- trees and archives: listing, reading, decoding ----


class Key(NamedTuple):
    """Where an image stands in a tree; the sort order is the order of the output."""

    split: str
    class_name: str
    name: str

    def __str__(self) -> str:
        return printable("/".join(self))


class Contents(NamedTuple):
    """A tree or archive: its fingerprint changes with any file; `members` reads it all."""

    path: Path
    fingerprint: str
    num_images: int | None  # None where only reading it all would tell
    members: Callable[[], Iterator[tuple[Key, bytes | None]]]  # None for a class folder, with an empty name


def _source(path: Path) -> Contents:
    try:
        return _list_tree(path) if path.is_dir() else _stat_archive(path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror})") from error


def _list_tree(path: Path) -> Contents:
    listing: dict[tuple[str, str], list[str]] = {}  # names of images by (split, class)
    facts: list[str] = [f"{CACHE_FORMAT} tree"]
    for split in SPLITS:
        for folder in _scan(path / split):
            if folder.is_dir():
                names = listing[split, folder.name] = []
                facts.append(repr((split, folder.name)))
                for entry in _scan(folder.path):
                    if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                        names.append(entry.name)
                        status = entry.stat()
                        facts.append(f"{entry.name!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")

    def members() -> Iterator[tuple[Key, bytes | None]]:
        keys = [Key(*folder, name) for folder, names in listing.items() for name in ("", *names)]
        _classes(path, keys)  # complain before the decoding, not after
        for key in keys:
            try:
                yield key, path.joinpath(*key).read_bytes() if key.name else None
            except OSError as error:
                raise UserError(f"cannot read {path}: {key} ({error.strerror})") from error

    fingerprint = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return Contents(path, fingerprint, sum(map(len, listing.values())), members)


def _scan(folder: Path | str) -> "list[os.DirEntry[str]]":
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=attrgetter("name"))


def _stat_archive(path: Path) -> Contents:
    status = path.stat()
    facts = (CACHE_FORMAT, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    fingerprint = hashlib.sha256(f"{facts} archive".encode()).hexdigest()
    return Contents(path, fingerprint, None, lambda: _read_archive(path))


def _read_archive(path: Path) -> Iterator[tuple[Key, bytes | None]]:
    """The tree inside an archive, in the archive's order. Nothing is unpacked; no member is trusted."""
    root: tuple[str, ...] | None = None
    folders: set[tuple[str, ...]] = set()
    seen: set[Key] = set()
    members = _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path)
    while True:
        try:
            member = next(members, None)
            if member is None:
                break
            name, read, num_bytes = member
            parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
            if any(part.startswith(".") for part in parts):
                continue
            if read is None:
                folders.add(parts)
                continue
            if len(parts) < 3 or parts[-3] not in SPLITS or not parts[-1].lower().endswith(IMAGE_SUFFIXES):
                continue
            if num_bytes > MAX_MEMBER_BYTES:
                raise UserError(
                    f"{path}: {printable(name)} has {num_bytes} bytes, more than the {MAX_MEMBER_BYTES} that an image "
                    "may have; shrink or remove it"
                )
            data = read()
        except UserError:
            raise
        except Exception as error:  # tarfile, zipfile, lzma, zlib and gzip raise a dozen kinds for damage
            detail = printable(str(error)) or type(error).__name__
            raise UserError(f"{path} is damaged or cut short ({detail}); get it anew") from error
        key = Key(*parts[-3:])
        if root not in (None, parts[:-3]) or key in seen:
            raise UserError(f"{path} holds more than one tree or {key} twice; keep one train/ and one test/ in it")
        root = parts[:-3]
        seen.add(key)
        yield key, data
    for parts in folders:
        if root is not None and len(parts) == len(root) + 2 and parts[:-2] == root and parts[-2] in SPLITS:
            yield Key(parts[-2], parts[-1], ""), None


Member = tuple[str, Callable[[], bytes] | None, int]  # name, how to read it (None for a folder), size in bytes


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                yield info.filename, None, 0
            elif stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG):
                yield info.filename, functools.partial(_read_zipped, archive, info), info.file_size


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member in small pieces: read at once, it is unpacked to its end first, however far that is beyond its size."""
    with archive.open(info) as stream:
        return b"".join(iter(functools.partial(stream.read, zipfile.ZipExtFile.MIN_READ_SIZE), b""))


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first for the archive's end; here only the end mark is.

    Long names and sparse files, which it would read into memory whatever their size, end at MAX_NAME_BYTES.
    """

    @classmethod
    def frombuf(cls, *args: Any) -> "_StrictTarInfo":
        info = super().frombuf(*args)
        if info.type in NAME_TYPES and info.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {info.size} bytes")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file, which only GNU tar writes")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(str(error)) from error


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, tarinfo=_StrictTarInfo) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # 2 KB for each of 60,000, kept for lookups never made
            if info.isdir():
                yield info.name, None, 0
            elif info.isreg():
                stream = tar.extractfile(info)
                assert stream is not None
                yield info.name, stream.read, info.size
        assert tar.fileobj is not None
        while tar.fileobj.read(2**20):  # to the end, where gzip and xz keep the sums that prove the rest
            pass


def _classes(path: Path, keys: Iterable[Key]) -> tuple[str, ...]:
    """The sorted classes; UserError unless train and test have the same ones, each with an image."""
    num_images: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for key in keys:
        of_split = num_images[key.split]
        of_split[key.class_name] = of_split.get(key.class_name, 0) + bool(key.name)
    for split in SPLITS:
        if not any(num_images[split].values()):
            raise UserError(f"{path} has no JPEG, PNG or WebP images in {split}/<class>/")
        for name, count in num_images[split].items():
            if not count:
                raise UserError(
                    f"{path}: {Key(split, name, '')} has no JPEG, PNG or WebP images; add some or remove it"
                )
    train, test = (set(num_images[split]) for split in SPLITS)
    for here, there, more in (("train", "test", train - test), ("test", "train", test - train)):
        if more:
            raise UserError(
                f"{path}: class {printable(min(more))} is in {here}/ but not in {there}/; both need the same"
            )
    return tuple(sorted(train))


def _decode(source: Contents, spool: IO[bytes]) -> "tuple[dict[str, Any], dict[Key, int]]":
    """Decode every image of `source` into `spool`, IMAGE_BYTES (3, 32, 32) each: the cache's header, and which image
    of the spool each one is."""
    from tqdm import tqdm

    keys: list[Key] = []
    positions: dict[Key, int] = {}
    num_resized = 0
    terminal = sys.stderr.isatty() and log.is_said("info")
    started_at = time.perf_counter()
    if not terminal:
        log.tell(f"decoding the images of {source.path}")

    def encoded() -> Iterator[tuple[Key, bytes]]:
        for key, data in source.members():
            keys.append(key)
            if data is not None:
                yield key, data

    def decode(key: Key, data: bytes) -> tuple[bytes, bool]:
        try:
            return decode_image(data, IMAGE_FORMATS)
        except UserError as error:
            raise UserError(f"{source.path}: {key} {error}; replace or remove it") from error

    with tqdm(total=source.num_images, desc="decoding", unit=" images", disable=not terminal) as progress:
        for key, (pixels, resized) in in_order(encoded(), decode):
            positions[key] = len(positions)
            spool.write(pixels)
            num_resized += resized
            progress.update()
    if not terminal:
        seconds = time.perf_counter() - started_at
        log.tell(f"decoded {len(positions)} images in {seconds:.1f} s")
    if num_resized:
        log.tell(f"{num_resized} of {len(positions)} images were not 32x32 and were resized")
    classes = _classes(source.path, keys)
    header: dict[str, Any] = {"fingerprint": source.fingerprint, "classes": classes}
    for split in SPLITS:
        per_class = dict.fromkeys(classes, 0)
        for key in positions:
            per_class[key.class_name] += key.split == split
        header[split] = list(per_class.values())
    return header, positions


def in_order(encoded: Iterable[tuple[T, bytes]], decode: Callable[[T, bytes], R]) -> Iterator[tuple[T, R]]:
    """Each image's key and what `decode(key, data)` makes of it; large ones are decoded ahead, in threads."""
    from concurrent.futures import ThreadPoolExecutor

    num_threads = os.cpu_count() or 1
    pending: deque[tuple[T, Callable[[], R]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for key, data in encoded:
            if len(data) >= THREADED_BYTES:
                pending.append((key, pool.submit(decode, key, data).result))
            elif pending:
                pending.append((key, functools.partial(decode, key, data)))
            else:
                yield key, decode(key, data)
            if len(pending) > 2 * num_threads:  # so that memory holds few encoded images, however many there are
                first, result = pending.popleft()
                yield first, result()
        for key, result in pending:
            yield key, result()


def decode_image(data: bytes, formats: tuple[str, ...] | None = None) -> tuple[bytes, bool]:
    """One encoded image to 3072 bytes (3, 32, 32) RGB 0..255, and whether it had to be resized.

    It may be of one of these formats of Pillow, by default of any. Raises UserError, with the rest of a sentence that
    begins with the image's name.
    """
    from PIL import Image, ImageOps

    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats or _every_format())
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if "exif" in image.info:  # asking first saves 2 s on 60,000 JPEGs
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P":  # by way of RGBA, or PIL warns about palettes with transparency
            image = image.convert("RGBA")
        if image.mode != "RGB":
            image = image.convert("RGB")
        resized = image.size != (32, 32)
        if resized:
            image = image.resize((32, 32), Image.Resampling.BICUBIC)
        pixels = np.frombuffer(image.tobytes(), np.uint8)  # PIL decodes no earlier than here
    except Image.DecompressionBombError as error:
        raise UserError("has far too many pixels") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more for damage
        known = "JPEG, PNG or WebP" if formats == IMAGE_FORMATS else "an image"
        raise UserError(f"cannot be decoded as {known}") from error
    return pixels.reshape(32, 32, 3).transpose(2, 0, 1).tobytes(), resized


@functools.cache
def _every_format() -> tuple[str, ...]:
    """What Pillow reads by itself: EPS it gives to Ghostscript, which runs the program that such a file is."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")
