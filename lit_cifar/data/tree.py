"""Trees train/<class>/<image> and test/<class>/<image>, and archives of such trees: what is in them, in which order.

layout.py says what belongs to a tree, packed.py reads archives, images.py decodes images, and cache.py keeps what was
decoded.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import attrgetter
from os import DirEntry, scandir
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

from lit_cifar import log
from lit_cifar.data.cache import SPLITS, Decoded, cached, fingerprint, read_header, read_split
from lit_cifar.data.images import IMAGE_FORMATS, decode_image, in_order, read_image
from lit_cifar.data.layout import BROKEN, NESTED, ClassNames, Key, LeftOut, is_hidden, is_image, reason_of
from lit_cifar.data.packed import images_in_archive
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
        """Decodes the images unless the cache is there and fresh; says in one line which files were left out.

        Raises:
            UserError: in one line, for an image or an archive that cannot be read, an empty class, classes that
                differ between train and test, one class or none, names that are not UTF-8 or the same in two forms,
                and a cache folder that cannot be written.
        """
        if self._cache_file is None:
            contents = list_contents(self.path)

            def check(file: Path) -> tuple[Path, dict[str, Any]]:
                return file, read_header(file, contents.fingerprint)

            self._cache_file, header = self._cached(contents, check)
            # from the cache too: whoever compares this run's accuracy with another's has to know
            (contents.left_out if self.path.is_dir() else LeftOut(header["left_out"])).say(self.path)

    def read(self, train: bool) -> Split:
        """The training or test images. Raises what `prepare` raises."""
        self.prepare()
        assert self._cache_file is not None
        with suppress(Exception):  # gone or damaged meanwhile
            return read_split(self._cache_file, None, train)  # listing 60,000 files again takes 0.3 to 0.5 s
        contents = list_contents(self.path)
        return self._cached(contents, lambda file: read_split(file, contents.fingerprint, train))

    def _cached(self, contents: "Contents", read: Callable[[Path], T]) -> T:
        return cached(self.path, contents.fingerprint, read, lambda spool: _decode(contents, spool))


class Contents(NamedTuple):
    """What is in a tree or archive: the fingerprint changes with any file; `images` reads them all."""

    path: Path
    fingerprint: str
    num_images: int | None  # None where only reading it all would tell
    images: Callable[[], Iterator[tuple[Key, bytes | None]]]  # None for a class folder, with an empty name
    left_out: LeftOut  # of an archive: filled by `images`


def list_contents(path: Path) -> Contents:
    """What is in the tree or archive at `path`.

    Raises:
        UserError: it cannot be listed, or has a class name that ClassNames refuses.
    """
    try:
        return _list_tree(path) if path.is_dir() else _list_archive(path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror})") from error


def _list_archive(path: Path) -> Contents:
    status, left_out = path.stat(), LeftOut()
    facts = ("archive", f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return Contents(path, fingerprint(facts), None, lambda: images_in_archive(path, left_out), left_out)


def _list_tree(path: Path) -> Contents:
    listing = _Listing(path)
    fingerprint_now = fingerprint(listing.facts())

    def images() -> Iterator[tuple[Key, bytes | None]]:
        _check_classes(path, {key: names.count("/") for key, (_, names) in listing.images.items()}, listing.left_out)
        for key, (folder, names) in listing.images.items():
            yield key, None
            for name in names.split("/")[1:]:
                try:
                    yield key._replace(name=name), read_image(os.path.join(folder, name))
                except UserError as error:
                    raise UserError(f"{path}: {key}{printable(name)} {error}") from error
                except OSError as error:
                    raise UserError(f"cannot read {path}: {key}{printable(name)} ({error.strerror})") from error

    num_images = sum(names.count("/") for _, names in listing.images.values())
    return Contents(path, fingerprint_now, num_images, images, listing.left_out)


class _Listing:
    """The files of a tree on the disk, listed by `facts`.

    `images` has for each class, by its key, its folder, and the names of its images, each after a slash: a million of
    them take 25 MB so, and 90 as strings of their own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: dict[Key, tuple[str, str]] = {}
        self.left_out = LeftOut()
        self._linked: set[int] = set()  # inodes of images that have another name too

    def facts(self) -> Iterator[str]:
        """Lists the tree: facts that change with any file that is read."""
        yield "tree"
        class_names = ClassNames(self.path)
        for split in SPLITS:
            for folder in _scan(self.path / split):
                if _kind(folder) == "folder":
                    yield repr((split, folder.name))
                    key = class_names.key(split, os.fsencode(folder.name).decode("utf-8", "surrogateescape"))
                    images: list[str] = []
                    yield from self._of_class(folder, f"{split}/{folder.name}/", images)
                    self.images[key] = folder.path, "".join(f"/{name}" for name in images)
                else:
                    self._leave_out(folder, f"{split}/{folder.name}")
        own = {os.stat(self.path / split).st_ino for split in SPLITS}
        for entry in _scan(self.path):
            # where the file system knows no case, Train/ is train/
            if entry.name not in SPLITS and entry.inode() not in own:
                self._outside(entry, entry.name, depth=2)

    def _of_class(self, folder: "DirEntry[str]", prefix: str, images: list[str]) -> Iterator[str]:
        through_link = folder.is_symlink() or (self.path / prefix.split("/")[0]).is_symlink()
        for entry in _scan(folder.path):
            if is_image(entry.name) and _kind(entry) == "file":
                images.append(entry.name)
                status = entry.stat()
                if through_link or status.st_nlink > 1 or entry.is_symlink():
                    self._linked.add(status.st_ino or entry.inode())  # 0 on Windows, but for links
                yield f"{entry.name!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            elif entry.is_dir(follow_symlinks=False):
                for nested in _files_below(entry.path):
                    self.left_out.add(NESTED, prefix + os.path.relpath(nested, folder.path))
            else:
                self._leave_out(entry, prefix + entry.name)

    def _leave_out(self, entry: "DirEntry[str]", name: str) -> None:
        kind = _kind(entry)
        if kind == "folder":  # by a link, which may lead anywhere
            self.left_out.add(NESTED, name)
        else:
            self.left_out.add(BROKEN if kind == "broken" else reason_of(name), name)

    def _outside(self, entry: "DirEntry[str]", name: str, depth: int) -> None:
        """Counts images beside train/ and test/, as deep as they would be in there; links may lead to some of them."""
        if entry.is_dir(follow_symlinks=False):
            if depth:
                with suppress(OSError):  # a folder that is not ours to read
                    for inner in _scan(entry.path):
                        self._outside(inner, f"{name}/{inner.name}", depth - 1)
        elif entry.is_file(follow_symlinks=False) and (reason := reason_of(name)) and entry.inode() not in self._linked:
            self.left_out.add(reason, name)


def _scan(folder: Path | str) -> "list[DirEntry[str]]":
    with scandir(folder) as entries:
        return sorted((entry for entry in entries if not is_hidden(entry.name)), key=attrgetter("name"))


def _files_below(folder: str) -> Iterator[str]:
    """Paths of the files in a folder and in those within it; links are not followed."""
    folders = [folder]
    while folders:
        with suppress(OSError):  # a folder that is not ours to read
            for entry in _scan(folders.pop()):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry.path


def _kind(entry: "DirEntry[str]") -> Literal["folder", "file", "special", "broken"]:
    """What an entry is, or what it links to; 'broken' is a link that leads nowhere or in a loop."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken" if entry.is_symlink() and not os.path.exists(entry.path) else "special"
    except PermissionError:
        raise
    except OSError:
        if not entry.is_symlink():
            raise
        return "broken"


def _check_classes(path: Path, num_images: dict[Key, int], left_out: LeftOut) -> tuple[str, ...]:
    """The sorted classes, given the number of images of each in each split.

    Raises:
        UserError: train and test have not the same classes, each with an image, or there is but one.
    """
    instead = f"; left out: {left_out}" if left_out.found else ""
    for split in SPLITS:
        of_split = {key: num for key, num in num_images.items() if key.split == split}
        if not any(of_split.values()):
            raise UserError(f"{path} has no JPEG, PNG or WebP images in {split}/<class>/{instead}")
        for key, num in of_split.items():
            if not num:
                raise UserError(f"{path}: {key} has no JPEG, PNG or WebP images; add some or remove it{instead}")
    train, test = ({key.class_name for key in num_images if key.split == split} for split in SPLITS)
    for here, there, more in (("train", "test", train - test), ("test", "train", test - train)):
        if more:
            raise UserError(
                f"{path}: class {printable(min(more))} is in {here}/ but not in {there}/; both need the same"
            )
    if len(train) == 1:
        raise UserError(f"{path} has one class, {printable(min(train))}: there is nothing to tell apart; add another")
    return tuple(sorted(train))


def _decode(contents: Contents, spool: IO[bytes]) -> Decoded:
    """Decodes every image of `contents` into `spool`."""
    from tqdm import tqdm

    images: dict[Key, dict[str, int]] = {}  # by class, which image of the spool has which name
    num_images = 0
    num_resized = 0
    terminal = log.is_terminal(sys.stderr) and log.is_said("info")
    started_at = time.perf_counter()
    if not terminal:
        log.tell(f"decoding the images of {contents.path}")

    def encoded() -> Iterator[tuple[Key, bytes]]:
        nonlocal num_images
        for key, data in contents.images():
            of_class = images.setdefault(key._replace(name=""), {})
            if data is not None:
                if key.name in of_class:
                    raise UserError(f"{contents.path} holds {key} twice; remove one of them")
                of_class[key.name] = num_images
                num_images += 1
                yield key, data

    def decode(key: Key, data: bytes) -> tuple[bytes, bool]:
        try:
            return decode_image(data, IMAGE_FORMATS)
        except UserError as error:
            raise UserError(f"{contents.path}: {key} {error}; replace or remove it") from error

    with tqdm(total=contents.num_images, desc="decoding", unit=" images", disable=not terminal) as progress:
        for _, (pixels, resized) in in_order(encoded(), decode):
            spool.write(pixels)
            num_resized += resized
            progress.update()
    if not terminal:
        log.tell(f"decoded {num_images} images in {time.perf_counter() - started_at:.1f} s")
    if num_resized:
        log.tell(f"{num_resized} of {num_images} images were not 32x32 and were resized")
    classes = _check_classes(contents.path, {key: len(names) for key, names in images.items()}, contents.left_out)
    num_per_class: dict[str, list[int]] = {}
    positions: dict[str, list[int]] = {}
    for split in SPLITS:
        of_split = [images[Key(split, name, "")] for name in classes]
        num_per_class[split] = [len(of_class) for of_class in of_split]
        positions[split] = [of_class[name] for of_class in of_split for name in sorted(of_class)]
    return Decoded(classes, num_per_class, positions, contents.left_out.found)
