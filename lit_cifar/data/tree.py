"""Trees train/<class>/<image> and test/<class>/<image>, and archives of such trees: what is in them, in which order.

members.py opens archives, images.py decodes images, and cache.py keeps what was decoded.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import attrgetter
from os import DirEntry, scandir
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from lit_cifar import log
from lit_cifar.data.cache import SPLITS, Decoded, cached, fingerprint, read_header, read_split
from lit_cifar.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, decode_image, in_order, read_image
from lit_cifar.data.members import read_members
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError
from lit_cifar.text import printable

T = TypeVar("T")


class Tree:
    """A data source: the images of a tree, or of one archive of a tree.

    Classes are the sorted folder names; images stand class by class, in sorted name order. JPEG, PNG and WebP are
    read; all become RGB, upright by their EXIF, and 32x32. The first reading decodes and writes a cache under
    `cache_dir()`; later ones read that in no time until a file changes.
    """

    is_here = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache_file: Path | None = None  # once it is known to be fresh

    @property
    def num_classes(self) -> int:
        """The number of classes K, for which the tree is prepared. Raises what `prepare` raises."""
        self.prepare()
        assert self._cache_file is not None
        return len(read_header(self._cache_file, None)["classes"])

    def prepare(self) -> None:
        """Decodes the images unless the cache is there and fresh.

        Raises:
            UserError: in one line, for an image or an archive that cannot be read, an empty class, classes that
                differ between train and test, no images at all, and a cache folder that cannot be written.
        """

        def check(file: Path, wanted: str) -> Path:
            read_header(file, wanted)
            return file

        if self._cache_file is None:
            self._cache_file = self._cached(check)

    def read(self, train: bool) -> Split:
        """The training or test images. Raises what `prepare` raises."""
        if self._cache_file is not None:  # listing 60,000 files again takes 0.3 to 0.5 s
            with suppress(Exception):  # gone or damaged meanwhile
                return read_split(self._cache_file, None, train)
        return self._cached(lambda file, wanted: read_split(file, wanted, train))

    def _cached(self, read: Callable[[Path, str], T]) -> T:
        contents = list_contents(self.path)
        wanted = contents.fingerprint
        return cached(self.path, wanted, lambda file: read(file, wanted), lambda spool: _decode(contents, spool))


class Key(NamedTuple):
    """Where an image stands in a tree; the sort order is the order of the output."""

    split: str
    class_name: str
    name: str

    def __str__(self) -> str:
        return printable("/".join(self))


class Contents(NamedTuple):
    """What is in a tree or archive: the fingerprint changes with any file; `images` reads them all."""

    path: Path
    fingerprint: str
    num_images: int | None  # None where only reading it all would tell
    images: Callable[[], Iterator[tuple[Key, bytes | None]]]  # None for a class folder, with an empty name


def list_contents(path: Path) -> Contents:
    """What is in the tree or archive at `path`.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        return _list_tree(path) if path.is_dir() else _list_archive(path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror})") from error


def _list_tree(path: Path) -> Contents:
    listing: dict[tuple[str, str], list[str]] = {}  # names of images by (split, class)
    facts = ["tree"]
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

    def images() -> Iterator[tuple[Key, bytes | None]]:
        keys = [Key(*folder, name) for folder, names in listing.items() for name in ("", *names)]
        _check_classes(path, keys)  # complain before the decoding, not after
        for key in keys:
            try:
                yield key, read_image(str(path.joinpath(*key))) if key.name else None
            except UserError as error:
                raise UserError(f"{path}: {key} {error}") from error
            except OSError as error:
                raise UserError(f"cannot read {path}: {key} ({error.strerror})") from error

    return Contents(path, fingerprint(facts), sum(map(len, listing.values())), images)


def _scan(folder: Path | str) -> "list[DirEntry[str]]":
    with scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=attrgetter("name"))


def _list_archive(path: Path) -> Contents:
    status = path.stat()
    facts = ("archive", f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return Contents(path, fingerprint(facts), None, lambda: _images_in_archive(path))


def _images_in_archive(path: Path) -> Iterator[tuple[Key, bytes | None]]:
    """The images of the tree inside an archive, in the archive's order, and then its class folders."""
    root: tuple[str, ...] | None = None
    folders: set[tuple[str, ...]] = set()
    seen: set[Key] = set()
    for parts, data in read_members(path, _is_image_of_tree):
        if data is None:
            folders.add(parts)
            continue
        key = Key(*parts[-3:])
        if root not in (None, parts[:-3]) or key in seen:
            raise UserError(f"{path} holds more than one tree or {key} twice; keep one train/ and one test/ in it")
        root = parts[:-3]
        seen.add(key)
        yield key, data
    for parts in folders:
        of_tree = root is not None and len(parts) == len(root) + 2 and parts[:-2] == root and parts[-2] in SPLITS
        if of_tree and not _is_hidden(parts):
            yield Key(parts[-2], parts[-1], ""), None


def _is_image_of_tree(parts: tuple[str, ...]) -> bool:
    in_class = len(parts) >= 3 and parts[-3] in SPLITS and parts[-1].lower().endswith(IMAGE_SUFFIXES)
    return in_class and not _is_hidden(parts)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def _check_classes(path: Path, keys: Iterable[Key]) -> tuple[str, ...]:
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


def _decode(contents: Contents, spool: IO[bytes]) -> Decoded:
    """Decodes every image of `contents` into `spool`."""
    from tqdm import tqdm

    keys: list[Key] = []
    positions: dict[Key, int] = {}
    num_resized = 0
    terminal = sys.stderr.isatty() and log.is_said("info")
    started_at = time.perf_counter()
    if not terminal:
        log.tell(f"decoding the images of {contents.path}")

    def encoded() -> Iterator[tuple[Key, bytes]]:
        for key, data in contents.images():
            keys.append(key)
            if data is not None:
                yield key, data

    def decode(key: Key, data: bytes) -> tuple[bytes, bool]:
        try:
            return decode_image(data, IMAGE_FORMATS)
        except UserError as error:
            raise UserError(f"{contents.path}: {key} {error}; replace or remove it") from error

    with tqdm(total=contents.num_images, desc="decoding", unit=" images", disable=not terminal) as progress:
        for key, (pixels, resized) in in_order(encoded(), decode):
            positions[key] = len(positions)
            spool.write(pixels)
            num_resized += resized
            progress.update()
    if not terminal:
        log.tell(f"decoded {len(positions)} images in {time.perf_counter() - started_at:.1f} s")
    if num_resized:
        log.tell(f"{num_resized} of {len(positions)} images were not 32x32 and were resized")
    return _sorted(_check_classes(contents.path, keys), positions)


def _sorted(classes: tuple[str, ...], positions: dict[Key, int]) -> Decoded:
    num_per_class = {split: dict.fromkeys(classes, 0) for split in SPLITS}
    order: dict[str, list[int]] = {split: [] for split in SPLITS}
    for key in sorted(positions):
        num_per_class[key.split][key.class_name] += 1
        order[key.split].append(positions[key])
    return Decoded(classes, {split: list(counts.values()) for split, counts in num_per_class.items()}, order)
