"""What a tree holds besides plain files: links are followed, and whatever is left out is counted and said."""

import io
import os
import stat
import sys
import tarfile
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import error_of, pixels
from PIL import Image

from lit_cifar import log
from lit_cifar.data import members, packed
from lit_cifar.data import tree as tree_module
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError
from lit_cifar.model.classifier import check_classes

CLASSES = ("ant", "bee")
Entry = str | tuple[str, ...]  # a file, (symbolic link, target) or (hard link, target, "hard")
BASE = [f"{split}/{name}/0.png" for split in ("train", "test") for name in CLASSES]

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def picture(*key: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(*key)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, entries: list[Entry]) -> Path:
    """An archive whose files are pictures of their own paths."""
    with tarfile.open(path, {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w:")) as archive:  # type: ignore[call-overload]
        for entry in entries:
            info = tarfile.TarInfo(entry if isinstance(entry, str) else entry[0])
            data = b""
            if isinstance(entry, tuple):
                info.type = tarfile.LNKTYPE if len(entry) == 3 else tarfile.SYMTYPE
                info.linkname = entry[1]
            elif entry.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                data = picture(members.clean_path(entry).removeprefix("my data/"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, entries: list[Entry]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for entry in entries:
            if isinstance(entry, str):
                archive.writestr(
                    entry, b"" if entry.endswith("/") else picture(members.clean_path(entry).removeprefix("my data/"))
                )
            else:
                info = zipfile.ZipInfo(entry[0])
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, entry[1])
    return path


def on_disk(path: Path, entries: list[Entry]) -> Path:
    for entry in entries:
        place = path / (entry if isinstance(entry, str) else entry[0])
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, str):
            place.mkdir(exist_ok=True) if entry.endswith("/") else place.write_bytes(picture(entry))
        elif len(entry) == 3:
            os.link(path / entry[1], place)
        else:
            place.symlink_to(entry[1])
    return path


def held(path: Path) -> dict[str, list[str]]:
    """The files that the images of each class are pictures of: 'train ant' to paths, in sorted order."""
    known = {torch.from_numpy(pixels(name)).permute(2, 0, 1).numpy().tobytes(): name for name in NAMES}
    result: dict[str, list[str]] = {}
    for train in (True, False):
        split = Tree(path).read(train)
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            key = f"{'train' if train else 'test'} {split.classes[label]}"
            result.setdefault(key, []).append(known[image.numpy().tobytes()])
    return result


NAMES = [*BASE, *(f"pool/{number}.png" for number in range(1, 4)), "more/cow/0.png", "more/cow/1.png", "blobs/ab12"]
HARD = ("train/ant/1.png", "pool/1.png", "hard")
# entries besides BASE, and which pictures the classes have beside their own
LINKED: dict[str, tuple[list[Entry], dict[str, list[str]]]] = {
    "hard": (["pool/1.png", HARD], {"train ant": ["pool/1.png"]}),
    "hard, before its target": ([HARD, "pool/1.png"], {"train ant": ["pool/1.png"]}),
    "hard, in the tree": ([("test/ant/1.png", "train/bee/0.png", "hard")], {"test ant": ["train/bee/0.png"]}),
    "relative": (["pool/1.png", ("train/bee/1.png", "../../pool/1.png")], {"train bee": ["pool/1.png"]}),
    "before its target": ([("train/bee/1.png", "../../pool/1.png"), "pool/1.png"], {"train bee": ["pool/1.png"]}),
    "absolute": (["pool/1.png", ("test/bee/1.png", "/pool/1.png")], {"test bee": ["pool/1.png"]}),
    "no suffix": (["blobs/ab12", ("train/ant/1.png", "../../blobs/ab12")], {"train ant": ["blobs/ab12"]}),
    "chain": (
        [("train/ant/1.png", "2.png"), ("train/ant/2.png", "/any"), ("any", "pool/../pool/3.png"), "pool/3.png"],
        {"train ant": ["pool/3.png"] * 2},
    ),
    "long chain": (
        [*((f"l{i}", f"l{i + 1}") for i in range(60)), ("l60", "pool/1.png"), "pool/1.png", ("train/ant/1.png", "/l0")],
        {"train ant": ["pool/1.png"]},
    ),
    "folders": (
        ["more/cow/0.png", "more/cow/1.png", ("train/cow", "../more/cow"), ("test/cow", "/more/cow/")],
        {"train cow": ["more/cow/0.png", "more/cow/1.png"], "test cow": ["more/cow/0.png", "more/cow/1.png"]},
    ),
    "link in a linked folder": (
        ["pool/2.png", ("more/cow/7.png", "../../pool/2.png"), ("train/cow", "../herd"), ("herd", "more/cow"),
         ("test/cow", "../more/cow")],
        {"train cow": ["pool/2.png"], "test cow": ["pool/2.png"]},
    ),
    "a class twice": (
        [("train/cow", "ant"), ("test/cow", "ant")],
        {"train cow": ["train/ant/0.png"], "test cow": ["test/ant/0.png"]},
    ),
}  # fmt: skip


ON_DISK = ("hard", "hard, in the tree", "relative", "no suffix", "link in a linked folder", "a class twice")


def expected(more: dict[str, list[str]]) -> dict[str, list[str]]:
    own = {" ".join(name.split("/")[:2]): [name] for name in BASE}
    return {key: [*own.get(key, []), *more.get(key, [])] for key in {**own, **more}}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "in a folder.tar"])
@pytest.mark.parametrize("case", LINKED)
def test_links_to_members_are_followed(
    tmp_path: Path, name: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    links, more = LINKED[case]
    if name.endswith(".zip") and any(len(link) == 3 for link in links if isinstance(link, tuple)):
        pytest.skip("a zip has no hard links")
    entries = [*links[: len(links) // 2], *BASE, *links[len(links) // 2 :]]
    if name.startswith("in"):
        top = "my data/"
        entries = [
            top + entry if isinstance(entry, str) else
            (top + entry[0], f"/{top}{entry[1]}" if entry[1][0] == "/" or len(entry) == 3 else entry[1], *entry[2:])
            for entry in entries
        ]  # fmt: skip
    path = (zipped if name.endswith(".zip") else tar)(tmp_path / name, entries)
    assert held(path) == expected(more)
    assert "left out" not in capsys.readouterr().err, "what links lead to is not outside"


@needs_links
@pytest.mark.parametrize("case", ON_DISK)
def test_links_on_the_disk_are_followed(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    links, more = LINKED[case]
    assert held(on_disk(tmp_path / "tree", [*BASE, *links])) == expected(more)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize(
    "links",
    [
        [("train", "data/one"), ("test", "data/two")],
        [("v1/train", "../data/one"), ("v1/test", "../data/two")],
        [(f"{split}/{name}", f"../data/{part}/{name}") for split, part in (("train", "one"), ("test", "two"))
         for name in CLASSES],
        [(f"{split}/{name}/0.png", f"/data/{part}/{name}/0.png") for split, part in (("train", "one"), ("test", "two"))
         for name in CLASSES],
    ],
    ids=["train and test", "in a folder", "classes", "images"],
)  # fmt: skip
def test_a_tree_may_consist_of_links(tmp_path: Path, links: list[Entry], pack: Callable[..., Path]) -> None:
    files = [f"data/{part}/{name}/0.png" for part in ("one", "two") for name in CLASSES]
    path = pack(tmp_path / f"a.{pack.__name__}".replace("zipped", "zip"), [*links, *files])
    for train, part in ((True, "one"), (False, "two")):
        split = Tree(path).read(train)
        assert split.classes == CLASSES
        for image, name in zip(split.images, CLASSES, strict=True):
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(pixels(f"data/{part}/{name}/0.png")))


def said(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said to be left out, in one line, which the cache brings back."""
    capsys.readouterr()
    lines = []
    for _ in range(2):
        tree = Tree(path)
        tree.prepare()
        tree.read(True)
        lines.append([line for line in capsys.readouterr().err.splitlines() if "left out" in line])
    assert lines[0] == lines[1]
    assert len(lines[0]) <= 1
    return lines[0][0] if lines[0] else ""


BAD_LINKS: dict[str, list[Entry]] = {
    "nowhere": [("train/ant/x.png", "y.png")],
    "hard, nowhere": [("train/ant/x.png", "train/ant/y.png", "hard")],
    "out": [("train/ant/x.png", "../../../../../../../../../../../../../../etc/passwd")],
    "absolute and out": [("train/ant/x.png", "/etc/passwd")],
    "itself": [("train/ant/x.png", "x.png")],
    "a loop": [("train/ant/x.png", "/a/y.png"), ("a/y.png", "/b"), ("b", "train/ant/x.png")],
    "growing": [("train/ant/x.png", "x.png/x.png/x.png")],
    "a class nowhere": [("train/cow", "../cow")],
    "a class in a loop": [("train/cow", "bull"), ("train/bull", "cow")],
    "empty": [("train/ant/x.png", "")],
}


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("case", BAD_LINKS)
def test_links_that_lead_nowhere_or_out_are_left_out_and_said(
    tmp_path: Path, case: str, pack: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = pack(tmp_path / f"a.{pack.__name__}".replace("zipped", "zip"), [*BAD_LINKS[case], *BASE])
    line = said(path, capsys)
    assert f"left out {2 if case == 'a class in a loop' else 1} links that lead nowhere or out (train/" in line
    assert held(path) == expected({})


@needs_links
@pytest.mark.parametrize("case", ["nowhere", "itself", "a loop", "growing", "a class nowhere", "a class in a loop"])
def test_bad_links_on_the_disk_are_left_out_and_said(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = on_disk(tmp_path / "tree", [*BASE, *BAD_LINKS[case]])
    assert "links that lead nowhere or out (train/" in said(path, capsys)
    assert held(path) == expected({})


def test_many_links_to_one_folder_are_no_bomb(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [*BASE, "pool/1.png", *((f"train/c{i}", "../pool") for i in range(2))])
    assert "train/c0/ and train/c1/ are links to one folder, 'pool'; remove one" in error_of(
        lambda: Tree(path).read(True)
    )


def test_an_endless_path_ends_in_one_line(tmp_path: Path) -> None:
    for number, entry in enumerate(["a/" * 3000 + "x.png", ("train/ant/1.png", "a/" * 3000)]):
        path = tar(tmp_path / f"{number}.tar", [*BASE, entry])
        assert "a path of more than 4096 characters" in error_of(lambda path=path: Tree(path).read(True))


def test_an_archive_without_links_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    read_members = packed.read_members
    monkeypatch.setattr(packed, "read_members", lambda path, wanted: opened.append(path) or read_members(path, wanted))
    held(tar(tmp_path / "a.tar", BASE))
    assert len(opened) == 1


# ---- what is left out ----

MIXED: list[Entry] = [
    *("train/ant/1.bmp", "train/ant/2.tif", "test/bee/3.GIF", "train/bee/no suffix", "train/bee/notes.txt"),
    *("train/ant/deeper/1.png", "train/ant/deeper/still/2.png"),
    *("train/loose.png", "val/ant/0.png", "val/1.bmp", "top.jpg"),
    # not worth a word
    *("README.md", "labels.csv", "train/labels.csv", "val/ant/notes.txt"),
    *("train/ant/.hidden.png", "train/ant/Thumbs.db", "test/bee/desktop.ini", "__MACOSX/train/ant/0.png"),
    *("train/.cache/1.png", ".git/x.png", "train/ant/@eaDir/0.png", "train/@eaDir/0.png", "train/ant/.DS_Store"),
]


@pytest.mark.parametrize("pack", [tar, zipped, on_disk])
def test_what_is_left_out_is_counted_by_reason_and_said_in_one_line(
    tmp_path: Path, pack: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name = {tar: "a.tar.gz", zipped: "a.zip", on_disk: "tree"}[pack]
    path = pack(tmp_path / name, [*BASE, *MIXED])
    line = said(path, capsys)
    assert line.startswith(f"lit_cifar: warning: {path}: left out ")
    reasons = dict(part.split(" ", 1)[::-1] for part in line.partition("left out ")[2].rstrip(")").split("), "))
    counts = {reason.partition(" (")[0]: int(count) for reason, count in reasons.items()}
    assert counts == {
        "other than JPEG, PNG or WebP by suffix": 5,
        "in folders within a class": 2,
        "outside train/<class>/ and test/<class>/": 4,
    }
    assert {reason.partition(" (")[2] for reason in reasons} <= {entry for entry in MIXED if isinstance(entry, str)}
    assert held(path) == expected({})


def test_pipes_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(tar(path, BASE), "a") as archive:
        pipe = tarfile.TarInfo("train/ant/pipe.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    assert "left out 1 devices or pipes (train/ant/pipe.png)" in said(path, capsys)
    if sys.platform != "win32":
        os.mkfifo(on_disk(tmp_path / "tree", BASE) / "train" / "ant" / "pipe.png")
        assert "left out 1 devices or pipes (train/ant/pipe.png)" in said(tmp_path / "tree", capsys)


def test_a_folder_that_a_link_in_a_class_leads_to_is_not_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = on_disk(tmp_path / "tree", [*BASE, ("train/ant/all", "/")])
    assert "left out 1 in folders within a class (train/ant/all)" in said(path, capsys)


def test_only_the_first_rank_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "a.tar", [*BASE, "train/ant/1.bmp"])
    monkeypatch.setattr(log, "rank", lambda: 1)
    assert said(path, capsys) == ""
    monkeypatch.undo()
    monkeypatch.setenv("LIT_CIFAR_CACHE", str(tmp_path / "cache"))
    assert "1 other than JPEG, PNG or WebP by suffix (train/ant/1.bmp)" in said(path, capsys), "decoded by the other"


def test_a_file_that_is_left_out_leaves_the_cache_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = on_disk(tmp_path / "tree", BASE)
    Tree(path).prepare()
    monkeypatch.setattr(tree_module, "_decode", lambda *_: pytest.fail("decoded again"))
    (path / "plot.png").touch()
    Tree(path).prepare()


def test_no_images_says_what_there_is_instead(tmp_path: Path) -> None:
    for pack, name in ((tar, "a.tar"), (on_disk, "tree")):
        path = pack(tmp_path / name, [entry.replace(".png", ".bmp") for entry in BASE])
        line = error_of(lambda path=path: Tree(path).read(True))
        assert line.endswith(
            "in train/<class>/; left out: 4 other than JPEG, PNG or WebP by suffix (train/ant/0.bmp)"
        ) or (line.endswith("(test/ant/0.bmp)"))


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jpeg"])
def test_jpeg_has_more_suffixes_than_two(tmp_path: Path, suffix: str) -> None:
    for pack, name in ((tar, "a.tar"), (on_disk, "tree")):
        path = pack(tmp_path / name, [*BASE, f"train/ant/1.{suffix}"])
        assert Tree(path).read(True).labels.tolist() == [0, 0, 1]


def test_paths_with_dots_are_members_too(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [f"../data/./x/../{name}" for name in BASE])
    assert len(Tree(path).read(True).labels) == 2


# ---- names of classes ----

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("pack", [tar, zipped, on_disk])
def test_names_are_the_same_in_whatever_form_of_unicode(tmp_path: Path, pack: Callable[..., Path]) -> None:
    name = {tar: "a.tar", zipped: "a.zip", on_disk: "tree"}[pack]
    path = pack(tmp_path / name, [f"train/{NFD}/0.png", f"test/{NFC}/0.png", "train/zoo/0.png", "test/zoo/0.png"])
    split = Tree(path).read(True)
    assert split.classes == (NFC, "zoo")
    first = torch.from_numpy(pixels(f"train/{NFD}/0.png")).permute(2, 0, 1)
    assert torch.equal(split.images[0], first)


@pytest.mark.parametrize("pack", [tar, zipped, on_disk])
def test_two_folders_of_the_same_name_in_two_forms_are_refused(tmp_path: Path, pack: Callable[..., Path]) -> None:
    name = {tar: "a.tar", zipped: "a.zip", on_disk: "tree"}[pack]
    path = pack(tmp_path / name, [f"{split}/{form}/0.png" for split in ("train", "test") for form in (NFC, NFD)])
    if pack is on_disk and len(list((path / "train").iterdir())) == 1:
        pytest.skip("this file system knows one form")
    line = error_of(lambda: Tree(path).read(True))
    assert "two folders of train/ have the same name 'café', in two forms of Unicode" in line
    assert "'caf\\xe9'" in line
    assert "'cafe\\u0301'" in line


def test_a_zip_of_a_mac_has_utf8_names_and_does_not_say_so(tmp_path: Path) -> None:
    entries = [f"{split}/{name}/0.png" for split in ("train", "test") for name in (NFD, "zoo")]
    path = zipped(tmp_path / "a.zip", [entry.replace(NFD, "XXXXXX") for entry in entries])
    path.write_bytes(path.read_bytes().replace(b"XXXXXX", NFD.encode()))
    assert len(NFD.encode()) == 6
    assert Tree(path).read(True).classes == (NFC, "zoo")
    dos = zipped(tmp_path / "dos.zip", [entry.replace(NFD, "XXXX") for entry in entries])
    dos.write_bytes(dos.read_bytes().replace(b"XXXX", "café".encode("cp437")))
    assert Tree(dos).read(True).classes == (NFC, "zoo")


def test_a_checkpoint_may_have_its_classes_in_another_form() -> None:
    check_classes({"lit_cifar": {"classes": ["ant", NFD]}}, ("ant", NFC))
    with pytest.raises(UserError, match="are not the data's"):
        check_classes({"lit_cifar": {"classes": ["ant", NFD]}}, ("ant", "cafe"))
    line = error_of(lambda: check_classes({"lit_cifar": {"classes": ["bee", "ant"]}}, ("ant", "bee")))
    assert "stand in another order" in line


@pytest.mark.parametrize("kind", ["tar", "zip", "folder"])
def test_a_class_name_that_is_not_utf8_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    bad = "caf\udce9"
    entries = [f"{split}/{name}/0.png" for split in ("train", "test") for name in (bad, "zoo")]
    if kind == "tar":
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
            for entry in entries:
                info, data = tarfile.TarInfo(entry), picture("x")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    elif kind == "zip":
        path = zipped(tmp_path / "a.zip", [entry.replace(bad, "cafÄ") for entry in entries])
        path.write_bytes(path.read_bytes().replace("Ä".encode(), b"\xff\xfe"))
    else:
        path = tmp_path / "tree"
        try:
            for entry in entries:
                (path / entry).parent.mkdir(parents=True)
                (path / entry).write_bytes(picture("x"))
        except (OSError, UnicodeError):
            pytest.skip("this system has no such names")
    line = error_of(lambda: CIFAR10DataModule(data_dir=str(path)).count_classes())
    assert "is not UTF-8" in line
    assert "caf" in line


@pytest.mark.parametrize("packed_", [False, True])
def test_one_class_is_refused(tmp_path: Path, packed_: bool) -> None:
    entries: list[Entry] = [entry for entry in BASE if "ant" in entry]
    path = tar(tmp_path / "a.tar", entries) if packed_ else on_disk(tmp_path / "tree", entries)
    line = error_of(lambda: CIFAR10DataModule(data_dir=str(path)).prepare_data())
    assert "has one class, ant: there is nothing to tell apart; add another" in line


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_archive_of_half_a_tree_is_refused(tmp_path: Path, split: str) -> None:
    path = tar(tmp_path / "a.tar", [entry for entry in BASE if entry.startswith(split)])
    missing = "test" if split == "train" else "train"
    assert f"has no JPEG, PNG or WebP images in {missing}/<class>/" in error_of(lambda: Tree(path).read(True))


# ---- memory ----


def test_names_of_many_images_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_images, num_classes, data = 10_000, 200, picture("x")

    def many(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[members.Member]:
        for number in range(num_images):
            split, label = "test" if number < num_classes else "train", number % num_classes
            yield members.Member(f"{split}/n{label:08}/n{label:08}_{number}.JPEG", "file", data)

    path = tar(tmp_path / "a.tar", BASE)
    monkeypatch.setattr(packed, "read_members", many)
    monkeypatch.setattr(tree_module, "in_order", lambda encoded, decode: ((key, (b"", False)) for key, _ in encoded))
    contents = tree_module.list_contents(path)
    tracemalloc.start()
    try:
        decoded = tree_module._decode(contents, io.BytesIO())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, decoded.positions.values())) == num_images
    assert peak / num_images < 300, "bytes for an image of 3,072"
