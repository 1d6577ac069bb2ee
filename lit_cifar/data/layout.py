"""The layout train/<class>/<image>, on the disk and in archives: names of classes, what is an image, and what is left
out. tree.py lists folders, and packed.py archives."""

import unicodedata
from pathlib import Path
from typing import NamedTuple

from lit_cifar import log
from lit_cifar.data.cache import SPLITS
from lit_cifar.data.images import IMAGE_SUFFIXES
from lit_cifar.errors import UserError
from lit_cifar.text import printable

# Outside of class folders nothing but images is missed: a README or a table of labels need not be said.
OTHER_IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".jfi", ".jif", ".jp2", ".jxl", ".pbm", ".pcx"),
    *(".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff"),
)
LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")  # in lower case
OTHER_KIND = "other than JPEG, PNG or WebP by suffix"
NESTED = "in folders within a class"
OUTSIDE = "outside train/<class>/ and test/<class>/"
BROKEN = "links that lead nowhere or out"
SPECIAL = "devices or pipes"


class Key(NamedTuple):
    """Where an image stands in a tree; the sort order is the order of the output."""

    split: str
    class_name: str
    name: str  # empty for the class folder itself

    def __str__(self) -> str:
        return printable("/".join(self))


class ClassNames:
    """The names of class folders, one spelling for each: macOS decomposes accents (Unicode's NFD), others do not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[Key, tuple[str, Key]] = {}  # the folder that has the name, and the key as one object

    def key(self, split: str, folder: str) -> Key:
        """The class of a folder, by its name in NFC.

        Raises:
            UserError: the name is no UTF-8, or another folder of the split has the same one in another form.
        """
        key = Key(split, unicodedata.normalize("NFC", folder), "")
        if key not in self._known:
            try:
                folder.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{self.path}: the name of class {key.class_name!r} is not UTF-8; rename its folder"
                ) from None
            self._known[key] = folder, key
        first, key = self._known[key]
        if first != folder:
            raise UserError(
                f"{self.path}: two folders of {split}/ have the same name {key.class_name!r}, in two forms of Unicode "
                f"({first!a} and {folder!a}); rename or merge them"
            )
        return key


class LeftOut:
    """What a tree holds and is not read: by reason, how many files and the name of the first."""

    def __init__(self, found: dict[str, tuple[int, str]] | None = None) -> None:
        self.found = dict(found or {})

    def add(self, reason: str | None, name: str) -> None:
        """Counts a file; without a reason it is not worth mention."""
        if reason:
            count, first = self.found.get(reason, (0, name))
            self.found[reason] = count + 1, first

    def __str__(self) -> str:
        """The rest of a sentence that begins with 'left out'; empty when nothing was."""
        return ", ".join(f"{count} {reason} ({printable(name)})" for reason, (count, name) in self.found.items())

    def say(self, path: Path) -> None:
        """Says on the first rank what was left out, in one line."""
        if self.found and log.rank() == 0:
            log.warn(f"{path}: left out {self}")


def is_hidden(path: str) -> bool:
    """Whether a name, or a part of a path, is one that is passed over in silence."""
    return any(part[:1] == "." or part.lower() in LEFT_BY_SYSTEMS for part in path.split("/"))


def is_image(name: str) -> bool:
    """Whether a file is read, by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def in_class(path: str) -> bool:
    """Whether a path ends in train/<class>/<file> or test/<class>/<file>."""
    parts = path.split("/")
    return len(parts) > 2 and parts[-3] in SPLITS


def reason_of(path: str) -> str | None:
    """Why the file at a path is not read; None where nobody would miss it."""
    if is_hidden(path):
        return None
    parts = path.split("/")
    if any(part in SPLITS for part in parts[:-3]):
        return NESTED
    if in_class(path):
        return SPECIAL if is_image(path) else OTHER_KIND
    return OUTSIDE if path.lower().endswith((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)) else None
