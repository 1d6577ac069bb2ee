"""What the readers promise: the right pixels in the right order, one decoding, and one line for each thing wrong."""

import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import JPEG, LABELS, disk_with_room_for, error_of, pixels, write_official
from PIL import Image

from lit_cifar.data import cache as cache_module
from lit_cifar.data import images as images_module
from lit_cifar.data import members
from lit_cifar.data import tree as tree_module
from lit_cifar.data.archives import ARCHIVES
from lit_cifar.data.members import ARCHIVE_SUFFIXES
from lit_cifar.data.official import KNOWN_BY, OfficialArchive, OfficialFiles, find_dataset, read_official
from lit_cifar.data.source import find_source
from lit_cifar.data.split import Split
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError

NAMES = {"train": ("a10.png", "a2.png", "B.PNG"), "test": ("0.png", "1.png")}  # not in sorted order


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_CIFAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for split, names in NAMES.items():
        for class_name in ("zebra", "ant"):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).write_bytes(encode(Image.fromarray(pixels(split, class_name, name))))
    (root / "train" / "ant" / ".hidden.png").write_bytes(b"not an image")
    (root / "train" / "ant" / "notes.txt").write_bytes(b"not an image")
    (root / "train" / ".hidden").mkdir()
    return root


def pack(tree: Path, target: Path, prefix: str = "") -> Path:
    """`tree` as an archive of the kind `target` is named; the files in reverse order."""
    files = sorted(tree.rglob("*"), reverse=True)
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for file in files:
                archive.write(file, prefix + file.relative_to(tree).as_posix())
        return target
    kind = {".tar": "w:", ".tgz": "w:gz", ".gz": "w:gz", ".xz": "w:xz"}[target.suffix]
    with tarfile.open(target, kind) as tar:  # type: ignore[call-overload]
        for file in files:
            tar.add(file, prefix + file.relative_to(tree).as_posix(), recursive=False)
    return target


def expected(train: bool) -> torch.Tensor:
    split = "train" if train else "test"
    images = [pixels(split, c, name) for c in ("ant", "zebra") for name in sorted(NAMES[split])]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def check(path: Path) -> None:
    for train in (True, False):
        split = Tree(path).read(train)
        assert torch.equal(split.images, expected(train))
        assert split.labels.tolist() == [label for label in (0, 1) for _ in range(3 if train else 2)]
        assert split.classes == ("ant", "zebra")


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(tree_module, "_decode", decode)


# ---- Split ----


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 32, 31, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 2])),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([-1, 0])),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_split_refuses_what_does_not_fit(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images|labels"):
        Split(images, labels, ("a", "b"))


# ---- find_source ----


def kind_of(path: Path, dataset: str) -> tuple[type, bool]:
    """What kind of source a path is, and whether it is on this machine."""
    source = find_source(path, dataset)
    return type(source), source.is_here


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_find_source_tells_the_kinds_apart(tmp_path: Path, tree: Path, dataset: str) -> None:
    assert kind_of(tree, dataset) == (Tree, True)
    assert kind_of(tmp_path / "missing", dataset) == (OfficialFiles, False)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert kind_of(empty, dataset) == (OfficialFiles, False)
    for suffix in ARCHIVE_SUFFIXES:
        assert kind_of(pack(tree, tmp_path / f"a{suffix}"), dataset) == (Tree, True)
    spec = ARCHIVES[dataset]
    files = tmp_path / "official" / spec.folder
    files.mkdir(parents=True)
    for name in KNOWN_BY[dataset]:
        (files / name).write_bytes(b"")
    assert kind_of(tmp_path / "official", dataset) == kind_of(files, dataset) == (OfficialFiles, True)
    official = pack(tmp_path / "official", empty / spec.name)
    assert kind_of(official, dataset) == (OfficialArchive, True)
    assert kind_of(empty, dataset) == (OfficialFiles, False)  # the downloader picks the archive up
    official.rename(empty / "renamed")
    assert kind_of(empty / "renamed", dataset) == (OfficialArchive, True)

    other = "cifar10" if dataset == "cifar100" else "cifar100"
    for folder in (tmp_path / "official", files):
        assert kind_of(folder, other) == (OfficialFiles, False)
        assert find_dataset(folder) == dataset
    assert f"renamed holds {spec.title}, not {ARCHIVES[other].title}: add dataset='{dataset}'" in error_of(
        lambda: find_source(empty / "renamed", other)
    )
    assert find_dataset(tree) is None
    (empty / "train").touch()  # a script, say
    assert find_dataset(empty) is None


@pytest.mark.parametrize(("present", "missing"), [("train", "test"), ("test", "train")])
def test_half_a_tree_is_an_error_that_names_the_other_half(tmp_path: Path, present: str, missing: str) -> None:
    (tmp_path / present).mkdir()
    assert f"no {missing}/" in error_of(lambda: find_source(tmp_path, "cifar10"))


def test_no_archive_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "data.rar").write_bytes(b"Rar!")
    assert ".tar.xz, .zip" in error_of(lambda: find_source(tmp_path / "data.rar", "cifar10"))
    message = error_of(lambda: find_source(tmp_path / "data.zip", "cifar100"))
    assert "there is no archive" in message
    assert "to download CIFAR-100 into" in message


# ---- the official files ----


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_official_files_give_their_pixels_in_their_order(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = write_official(tmp_path / "official", dataset, monkeypatch)
    renamed = official.rename(official.parent / "renamed")
    train_names = [f"data_batch_{i}" for i in range(1, 6)] if dataset == "cifar10" else ["train"]
    for train, names in ((True, train_names), (False, ["test_batch" if dataset == "cifar10" else "test"])):
        split = read_official(renamed, dataset, train)
        wanted = np.stack([pixels(name, str(i)).transpose(2, 0, 1) for name in names for i in range(10)])
        assert torch.equal(split.images, torch.from_numpy(wanted))
        assert split.labels.tolist() == LABELS[dataset] * len(names)
        assert split.classes == tuple(f"class_{i}" for i in range(10 if dataset == "cifar10" else 100))
    renamed.rename(official)
    assert torch.equal(read_official(official.parent, dataset, False).images, split.images)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        *(("cifar10", name) for name in ("data_batch_3", "test_batch", "batches.meta")),
        *(("cifar100", name) for name in ("train", "test", "meta")),
    ],
)
def test_a_flipped_byte_is_named_before_any_pickle_is_opened(
    tmp_path: Path, dataset: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = write_official(tmp_path / "official", dataset, monkeypatch)
    data = bytearray((official / name).read_bytes())
    data[len(data) // 2] ^= 1
    (official / name).write_bytes(data)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened a pickle"))
    message = error_of(lambda: read_official(official.parent, dataset, True))
    assert message == (f"{official / name} does not match its checksum (damaged?); delete {official} and start again")
    (official / name).unlink()
    assert f"{official / name} is missing" in error_of(lambda: read_official(official.parent, dataset, True))


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_a_folder_without_official_files_is_an_error(tmp_path: Path, dataset: str) -> None:
    assert ARCHIVES[dataset].folder in error_of(lambda: read_official(tmp_path, dataset, True))


def test_both_datasets_in_one_folder_and_the_name_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dataset in ARCHIVES:
        write_official(tmp_path / "data", dataset, monkeypatch)
    for dataset, num_classes in (("cifar10", 10), ("cifar100", 100)):
        assert kind_of(tmp_path / "data", dataset) == (OfficialFiles, True)
        assert len(read_official(tmp_path / "data", dataset, False).classes) == num_classes


# ---- trees and archives ----


def test_a_tree_gives_its_pixels_in_sorted_order(tree: Path) -> None:
    check(tree)
    assert Tree(tree).num_classes == 2


@pytest.mark.parametrize("prefix", ["", "./", "my data/v1/", "train/"])
@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_an_archive_equals_its_tree(tmp_path: Path, tree: Path, suffix: str, prefix: str) -> None:
    check(pack(tree, tmp_path / f"a{suffix}", prefix))


def test_large_files_decoded_in_threads_keep_their_order(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "THREADED_BYTES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check(tree)


def test_other_sizes_are_resized_and_that_is_said_once(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour = np.array([200, 100, 50], np.uint8)
    big = Image.fromarray(np.broadcast_to(colour, (48, 65, 3)).copy())
    (tree / "train" / "ant" / "a2.png").write_bytes(encode(big))
    images = Tree(tree).read(True).images
    assert torch.equal(images[2], torch.from_numpy(colour).view(3, 1, 1).expand(3, 32, 32))
    Tree(tree).read(False)
    said = capsys.readouterr().err
    assert said.count("1 of 10 images were not 32x32 and were resized\n") == 1
    assert re.search(r"^decoded 10 images in \d+\.\d s$", said, re.MULTILINE)
    assert said.replace("\n", "").isprintable(), "no control codes where stderr is no terminal"


def test_every_mode_becomes_rgb(tree: Path) -> None:
    grey = pixels("grey")[..., 0]
    palette = Image.fromarray(pixels("palette")).quantize(16)
    rgba = np.dstack([pixels("rgba"), np.full_like(grey, 255)])  # test_pixels.py has what is transparent
    made = {
        "grey.png": (encode(Image.fromarray(grey)), np.dstack([grey] * 3)),
        "grey16.png": (encode(Image.fromarray(grey.astype(np.uint16) * 256 + 77)), np.dstack([grey] * 3)),
        "palette.png": (encode(palette), np.asarray(palette.convert("RGB"))),
        "rgba.png": (encode(Image.fromarray(rgba)), rgba[..., :3]),
        "z.webp": (encode(Image.fromarray(pixels("webp")), "WEBP", lossless=True), pixels("webp")),
    }
    for name, (data, _) in made.items():
        (tree / "train" / "zebra" / name).write_bytes(data)
    images = Tree(tree).read(True).images[-len(made) :].permute(0, 2, 3, 1).numpy()
    for image, (name, (_, wanted)) in zip(images, made.items(), strict=True):
        assert np.array_equal(image, wanted), name


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_turns_an_image_upright(tree: Path, kind: str, options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = encode(Image.fromarray(pixels("turned")), kind, exif=exif, **options)
    (tree / "train" / "ant" / f"A.{kind.lower()}").write_bytes(data)
    image = Tree(tree).read(True).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(image, np.rot90(pixels("turned"), -1))


# ---- the cache ----


def test_the_second_reading_decodes_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tree, tmp_path / "a.tar.xz")
    Tree(tree).prepare()
    Tree(archive).prepare()
    forbid_decoding(monkeypatch)
    Tree(tree).prepare()
    check(tree)
    check(archive)
    monkeypatch.chdir(tree)
    check(Path())


def added(tree: Path) -> None:
    (tree / "test" / "ant" / "new.png").write_bytes((tree / "test" / "ant" / "0.png").read_bytes())


def changed_keeping_size_and_mtime(tree: Path) -> None:
    file = tree / "train" / "ant" / "a2.png"
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed(tree: Path) -> None:
    (tree / "train" / "ant" / "a2.png").rename(tree / "train" / "ant" / "a3.png")


def class_renamed(tree: Path) -> None:
    for split in NAMES:
        (tree / split / "ant").rename(tree / split / "emu")


@pytest.mark.parametrize(
    "change",
    [
        added,
        changed_keeping_size_and_mtime,
        renamed,
        class_renamed,
        lambda tree: (tree / "train" / "ant" / "a2.png").unlink(),
        lambda tree: os.utime(tree / "test" / "zebra" / "0.png"),
    ],
)
def test_any_change_of_the_tree_is_seen(
    tree: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Tree(tree).prepare()
    change(tree)
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded again"):
        Tree(tree).read(False)


def test_a_new_empty_class_is_seen_although_a_cache_is_there(tree: Path) -> None:
    Tree(tree).prepare()
    (tree / "train" / "cow").mkdir()
    assert "train/cow/" in error_of(lambda: Tree(tree).prepare())


def test_a_changed_archive_or_cache_format_is_seen(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tree, tmp_path / "a.zip")
    Tree(tree).prepare()
    Tree(archive).prepare()
    forbid_decoding(monkeypatch)
    monkeypatch.setattr(cache_module, "CACHE_FORMAT", cache_module.CACHE_FORMAT + 1)
    for path in (tree, archive):
        with pytest.raises(AssertionError, match="decoded again"):
            Tree(path).prepare()
    monkeypatch.undo()
    monkeypatch.setenv("LIT_CIFAR_CACHE", str(tmp_path / "cache"))
    (tree / "train" / "ant" / "a2.png").write_bytes(encode(Image.fromarray(pixels("new"))))
    pack(tree, archive)
    assert torch.equal(Tree(archive).read(True).images[2], torch.from_numpy(pixels("new")).permute(2, 0, 1))


def test_no_damage_to_the_cache_gets_through(tree: Path, cache: Path) -> None:
    Tree(tree).read(True)
    (file,) = cache.glob("*.zip")
    good = file.read_bytes()
    header = good.index(b"}") + 1
    places = {*range(0, header + 64, 2), *range(header, len(good), 997), *range(len(good) - 256, len(good))}
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        fingerprint = tree_module.list_contents(tree).fingerprint
        for train in (True, False):
            try:
                split = cache_module.read_split(file, fingerprint, train)
            except Exception:  # any will do: `cached` decodes again
                continue
            assert torch.equal(split.images, expected(train))
            assert split.classes == ("ant", "zebra")
    for damaged in (good[:-1], good[: len(good) // 2], b"", good[:2000] + b"x" + good[2001:]):
        file.write_bytes(damaged)
        check(tree)
        assert file.stat().st_size == len(good)
    assert not list(cache.glob("*.tmp"))


def test_two_processes_decode_once(tree: Path, cache: Path) -> None:
    code = "from pathlib import Path; from lit_cifar.data.tree import Tree; print('ready', flush=True); "
    code += f"print(Tree(Path({str(tree)!r})).read(True).images.sum().item())"
    Tree(tree).prepare()
    (file,) = cache.glob("*.zip")
    file.unlink()
    with FileLock(file.with_suffix(".lock")):  # until both have found no cache
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
    ends = [process.communicate(timeout=60) for process in processes]
    assert [end[0].strip() for end in ends] == [str(expected(True).sum().item())] * 2
    assert sum(end[1].count("decoded 10 images") for end in ends) == 1, ends


def test_a_fresh_cache_is_read_without_the_lock(tree: Path, cache: Path) -> None:
    Tree(tree).prepare()
    for lock in cache.glob("*.lock"):
        lock.unlink()
    check(tree)
    assert not list(cache.glob("*.lock"))


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_way_out(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LIT_CIFAR_CACHE", str(tmp_path / "file" / "cache"))
    message = error_of(lambda: Tree(tree).read(True))
    assert str(tmp_path / "file" / "cache") in message
    assert "LIT_CIFAR_CACHE" in message


@pytest.mark.parametrize("room", [0, 5_000, 13_000, 30_000])
def test_a_disk_that_fills_up_while_decoding_is_told_and_nothing_is_trusted(tree: Path, cache: Path, room: int) -> None:
    with disk_with_room_for(room):
        message = error_of(lambda: Tree(tree).read(True))
    assert f"cannot write the cache folder {cache} (File too large)" in message
    assert not list(cache.glob("*.zip"))
    check(tree)


# ---- errors, each in one line that names what is wrong ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("content", [b"", b"no image\n", "cut short"])
def test_an_image_that_cannot_be_decoded_is_named(
    tree: Path, tmp_path: Path, content: bytes | str, packed: bool
) -> None:
    data = encode(Image.fromarray(pixels("cut")), "JPEG")[:-200] if isinstance(content, str) else content
    (tree / "test" / "zebra" / "bad\nname.jpg").write_bytes(data)
    path = pack(tree, tmp_path / "a.tar") if packed else tree
    message = error_of(lambda: Tree(path).read(True))
    assert str(path) in message
    assert "bad\\nname.jpg" in message


def test_an_image_with_too_many_pixels_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "train/ant/B.PNG has far too many pixels" in error_of(lambda: Tree(tree).read(True))


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_a_member_too_large_is_named_and_not_read(
    tree: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "MAX_MEMBER_BYTES", 10_000)
    (tree / "test" / "ant" / "huge.png").write_bytes(bytes(10_001))
    archive = pack(tree, tmp_path / f"a{suffix}")
    assert "test/ant/huge.png has 10001 bytes" in error_of(lambda: Tree(archive).read(True))


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_class_is_named(tree: Path, tmp_path: Path, packed: bool) -> None:
    (tree / "test" / "cow").mkdir()
    path = pack(tree, tmp_path / "a.zip") if packed else tree
    assert "test/cow/ has no JPEG" in error_of(lambda: Tree(path).read(True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("here", "there"), [("train", "test"), ("test", "train")])
def test_classes_that_differ_are_named_with_their_side(
    tree: Path, tmp_path: Path, here: str, there: str, packed: bool
) -> None:
    (tree / there / "ant").rename(tmp_path / "away")
    path = pack(tree, tmp_path / "a.tgz") if packed else tree
    assert f"class ant is in {here}/ but not in {there}/" in error_of(lambda: Tree(path).read(True))


@pytest.mark.parametrize("packed", [False, True])
def test_no_images_at_all_is_an_error(tmp_path: Path, packed: bool) -> None:
    for split in NAMES:
        (tmp_path / "none" / split).mkdir(parents=True)
    path = pack(tmp_path / "none", tmp_path / "a.tar") if packed else tmp_path / "none"
    assert "no JPEG, PNG or WebP images in train/<class>/" in error_of(lambda: Tree(path).read(True))


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_an_archive_cut_short_anywhere_is_named(tree: Path, tmp_path: Path, suffix: str) -> None:
    archive = pack(tree, tmp_path / f"a{suffix}")
    good = archive.read_bytes()
    end = len(good.rstrip(b"\0")) if suffix == ".tar" else len(good)
    end -= end % -512 if suffix == ".tar" else 1  # a .tar may lose zeros at its end
    for length in {0, 1, 100, *range(512, end, 512 * 5), end // 512 * 512, end}:
        archive.write_bytes(good[:length])
        assert str(archive) in error_of(lambda: Tree(archive).read(True)), length


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.xz", ".zip"])
def test_an_archive_with_a_flipped_byte_never_gives_other_pixels(tree: Path, tmp_path: Path, suffix: str) -> None:
    archive = pack(tree, tmp_path / f"a{suffix}")
    good = archive.read_bytes()
    num_errors = 0
    for place in range(0, len(good), len(good) // 40):
        bad = bytearray(good)
        bad[place] ^= 16
        archive.write_bytes(bad)
        try:
            split = Tree(archive).read(True)
        except UserError:
            num_errors += 1
        else:  # it hit what no reader looks at, such as a date
            assert torch.equal(split.images, expected(True))
    assert num_errors > 20


def test_links_in_an_archive_are_ignored(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "/etc/passwd"),
            (tarfile.FIFOTYPE, ""),
        ):
            link = tarfile.TarInfo(f"train/ant/{kind.decode()}.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)
        tar.add(tree / "train", "train")
        tar.add(tree / "test", "test")
    check(archive)
    archive = pack(tree, tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as zipped:
        symlink = zipfile.ZipInfo("train/ant/link.png")
        symlink.external_attr = 0o120777 << 16
        zipped.writestr(symlink, "/etc/passwd")
    check(archive)


def test_two_trees_in_one_archive_are_an_error(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, tmp_path / "a.zip", "one/")
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr("two/train/ant/x.png", encode(Image.fromarray(pixels("x"))))
    assert "more than one tree" in error_of(lambda: Tree(archive).read(True))


def test_an_encrypted_zip_and_a_vanished_path_are_errors(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, tmp_path / "a.zip")
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            data[place + offset] |= 1
    archive.write_bytes(data)
    assert "encrypted" in error_of(lambda: Tree(archive).read(True))
    assert "No such file" in error_of(lambda: Tree(tmp_path / "b.zip").read(True))


# ---- the real thing ----


@pytest.mark.slow
@pytest.mark.skipif(not JPEG.is_file(), reason=f"{JPEG.name} is not there; LIT_CIFAR_JPEG can name it")
def test_all_of_cifar10_as_jpeg() -> None:
    train, test = Tree(JPEG).read(True), Tree(JPEG).read(False)
    assert train.classes == test.classes
    assert train.classes[::3] == ("airplane", "cat", "frog", "truck")
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    # Exact sums of integers by channel; the figures are from the README beside the archive.
    counts = torch.stack([train.images[:, channel].flatten().bincount(minlength=256) for channel in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = ((counts * values**2).sum(1) / counts.sum(1) - mean**2).sqrt()
    assert [round(x, 4) for x in mean.tolist()] == [0.4913, 0.4821, 0.4465]
    assert [round(x, 4) for x in std.tolist()] == [0.2452, 0.2428, 0.2606]
