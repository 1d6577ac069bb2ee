"""The images of a tree in an archive, with those that links lead to. members.py opens archives and resolves links;
folders on the disk are listed in tree.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_cifar.data.cache import SPLITS
from lit_cifar.data.layout import (
    BROKEN,
    NESTED,
    OTHER_KIND,
    ClassNames,
    Key,
    LeftOut,
    in_class,
    is_hidden,
    is_image,
    reason_of,
)
from lit_cifar.data.members import Links, read_members
from lit_cifar.errors import UserError


def images_in_archive(path: Path, left_out: LeftOut) -> Iterator[tuple[Key, bytes | None]]:
    """The images of the tree inside an archive, in the archive's order, and then its class folders, without data.

    Only names of folders and links are kept. Where there are links, the archive is read once more for what they lead
    to, which may stand anywhere in it.

    Args:
        path: the archive.
        left_out: is told what is not read.

    Raises:
        UserError: the archive cannot be read, holds two trees, or has a class name that ClassNames refuses.
    """
    names = ClassNames(path)
    root: str | None = None
    folders: set[str] = set()  # at the place of a class's
    links = Links()
    for member in read_members(path, _is_image_of_tree):
        if member.kind == "link":
            links.add(member)
        elif member.kind == "folder":
            if _above(member.path).rpartition("/")[2] in SPLITS and not is_hidden(member.path):
                folders.add(member.path)
        elif member.data is None:
            left_out.add(reason_of(member.path), member.path)
        else:
            root = _same_root(path, root, member.path)
            yield _key(names, *member.path.split("/")[-3:]), member.data
    if len(links):
        yield from _linked_images(path, root, links, names, left_out)
        root = root if root is not None else _root_of(links)
    for folder in sorted(folders):
        above, split, class_name = f"/{folder}".rsplit("/", 2)
        if above.lstrip("/") == root:
            yield names.key(split, class_name), None


def _is_image_of_tree(path: str) -> bool:
    return in_class(path) and is_image(path) and not is_hidden(path)


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _key(names: ClassNames, split: str, folder: str, name: str) -> Key:
    return names.key(split, folder)._replace(name=name)


def _same_root(path: Path, root: str | None, image: str) -> str:
    """The path above train/ or test/ of an image, which is `root` where that is known."""
    mine = "/".join(image.split("/")[:-3])
    if root not in (None, mine):
        raise UserError(f"{path} holds more than one tree, one with {image!r}; keep one train/ and one test/ in it")
    return mine


def _root_of(links: Links) -> str:
    """The path above train/ and test/ of a tree that is made of links: of images, of class folders, or of these two."""
    for place in (-3, -2, -1):
        for link in links:
            parts = link.split("/")
            if len(parts) >= -place and parts[place] in SPLITS and not is_hidden(link):
                return "/".join(parts[:place])
    return ""


def _linked_images(
    path: Path, root: str | None, links: Links, names: ClassNames, left_out: LeftOut
) -> Iterator[tuple[Key, bytes | None]]:
    """The images that links of an archive lead to, and the class folders. What is left out is counted anew."""
    left_out.found.clear()  # what seemed to stand outside may be what links lead to
    plan = _Plan(path, root, links, names, left_out)
    files: set[str] = set()  # that links lead to
    folders: set[str] = set()
    for member in read_members(path, lambda name: any(True for _ in plan.keys_of(name))):
        folder = member.path if member.kind == "folder" else _above(member.path)
        while folder and folder not in folders:
            folders.add(folder)
            folder = _above(folder)
        if member.kind == "file" and (member.path in plan.files or member.path in plan.folders):
            files.add(member.path)
        if member.data is not None:
            for key in plan.keys_of(member.path):
                yield key, member.data
        elif member.kind == "special" or (member.kind == "file" and not _is_image_of_tree(member.path)):
            left_out.add(reason_of(member.path), member.path)
    for target, keys in plan.folders.items():
        for key in keys:
            if target in folders:
                yield key, None
            else:
                name = f"{key.split}/{key.class_name}"
                left_out.add(reason_of(name) if target in files else BROKEN, name)
    for target, keys in plan.files.items():
        for key in keys:
            reason = NESTED if target in folders else BROKEN if target not in files else None
            left_out.add(reason or (None if is_image(key.name) else OTHER_KIND), "/".join(key))


class _Plan:
    """Which members of an archive are images of its tree by way of links."""

    def __init__(self, path: Path, root: str | None, links: Links, names: ClassNames, left_out: LeftOut) -> None:
        self.path, self.names, self.links, self.left_out = path, names, links, left_out
        root = root if root is not None else _root_of(links)
        self.own = {f"{root}/{split}".lstrip("/"): split for split in SPLITS}  # the tree's own two folders
        self.splits: dict[str, list[str]] = {folder: [split] for folder, split in self.own.items()}
        self.folders: dict[str, list[Key]] = {}  # that a class's link leads to
        self.files: dict[str, list[Key]] = {}  # that an image's link leads to
        for folder, split in self.own.items():
            target = links.resolve(folder)
            if target != folder:
                self._lead(self.splits, target, split, folder)
        visible = [link for link in links if not is_hidden(link)]
        for link in visible:
            if link not in self.own:
                for split in self.splits.get(_above(link), ()):
                    key = names.key(split, link.rpartition("/")[2])
                    self._lead(self.folders, links.resolve(link), key, link)
        for link in visible:
            if link not in self.own:
                self._add_file(link, root)

    def _add_file(self, link: str, root: str) -> None:
        if _is_image_of_tree(link):
            _same_root(self.path, root, link)
        keys = list(self._keys_at(link, own=True))
        for key in keys:
            self._lead(self.files, self.links.resolve(link), key, link)
        if not keys and reason_of(link) == NESTED:
            self.left_out.add(NESTED, link)

    def _lead(self, leads: dict[str, list[Any]], target: str | None, what: object, link: str) -> None:
        if target is None:
            self.left_out.add(BROKEN, link)
        else:
            leads.setdefault(target, []).append(what)

    def keys_of(self, path: str) -> Iterator[Key]:
        """The images that a file is by way of links; not the one that it is by its own place."""
        yield from (key for key in self.files.get(path, ()) if is_image(key.name))
        if is_image(path) and not is_hidden(path.rpartition("/")[2]):
            yield from self._keys_at(path, own=False)

    def _keys_at(self, path: str, own: bool) -> Iterator[Key]:
        """What a file or link is called in the tree, by the folders that it lies in."""
        folder, _, name = path.rpartition("/")
        keys = self.folders.get(folder, [])
        if len({key.split for key in keys}) < len(keys):  # many links to one large folder would be a bomb
            raise UserError(f"{self.path}: {keys[0]} and {keys[1]} are links to one folder, {folder!r}; remove one")
        for key in keys:
            yield key._replace(name=name)
        above, _, class_name = folder.rpartition("/")
        if (own or above not in self.own) and not is_hidden(class_name):
            for split in self.splits.get(above, ()):
                yield self.names.key(split, class_name)._replace(name=name)
