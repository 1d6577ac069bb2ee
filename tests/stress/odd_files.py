"""Makes files for fuzz.py: images of many formats and archives of trees, sound and odd. What is done to their bytes
afterwards is in fuzz.py."""

import contextlib
import io
import random
import struct
import tarfile
import zipfile
import zlib
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from lit_cifar.data.images import ANY_FORMAT


def encoded(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def images() -> dict[str, bytes]:
    picture = Image.frombytes("RGB", (40, 33), random.Random(0).randbytes(40 * 33 * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for kind, options in (
        ("JPEG", {"exif": exif}), ("PNG", {"exif": exif}), ("WEBP", {}), ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}), ("PPM", {}), ("TGA", {}), ("ICO", {}), ("PCX", {}), ("JPEG2000", {}), ("SGI", {}), ("DDS", {}),
    ):  # fmt: skip
        stream = io.BytesIO()
        with contextlib.suppress(OSError, KeyError):  # a Pillow without this one
            picture.save(stream, kind, **options)
            found[kind] = stream.getvalue()
    stream = io.BytesIO()
    picture.quantize(16).save(stream, "PNG", interlace=1)
    found["palette"] = stream.getvalue()
    return found


# ---- images of odd kinds: what a header may say, well-formed or not ----

sizes = st.one_of(*[st.integers(1, 40)] * 9, st.sampled_from((0, 255, 9000, 2**31)))
numbers = st.sampled_from((0, 1, 2, 3, 5, 6, 8, 16, 32, 255, 4095, 65535, 2**20 + 1, 2**31, 2**32 - 1))
blocks = st.lists(
    st.tuples(
        st.sampled_from((b"tRNS", b"sBIT", b"iCCP", b"eXIf", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iTXt")),
        st.sampled_from((b"\x10\x10\x10", b"\x0c", b"\0\1", b"a\0\0" + zlib.compress(bytes(2**22))))
        | st.binary(max_size=26),
    ),
    max_size=2,
)

# bits of a value and the kind of colour; the last one does not exist
PNG_KINDS = (
    (1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (2, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6), (1, 1),
)  # fmt: skip


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@st.composite
def png(draw: Any) -> bytes:
    width, height, (bits, colour) = draw(sizes), draw(sizes), draw(st.sampled_from(PNG_KINDS))
    row = 1 + (width * bits * {2: 3, 4: 2, 6: 4}.get(colour, 1) + 7) // 8
    rows = random.Random(width).choices(range(256), k=row - 1) if row < 2**10 else bytes(2**10)
    data = (b"\0" + bytes(rows)) * min(height, 64)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, draw(st.sampled_from((0, 0, 0, 1))))
    palette = [chunk(b"PLTE", bytes(range(255)))] if colour == 3 else []
    chunks = [
        chunk(b"IHDR", header),
        *palette,
        *(chunk(*block) for block in draw(blocks)),
        chunk(b"IDAT", zlib.compress(data)),
    ]
    chunks += [chunk(*block) for block in draw(blocks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@st.composite
def tiff(draw: Any) -> bytes:
    order = draw(st.sampled_from("<>"))
    depths = [draw(st.sampled_from((1, 4, 8, 12, 16, 32)))]
    num_colours = draw(st.sampled_from((1, 1, 2, 3, 3, 4, 5)))
    fields: dict[int, list[int]] = {
        256: [draw(sizes)], 257: [draw(sizes)], 258: depths * num_colours, 273: [8], 277: [num_colours], 278: [2**20],
        259: [draw(st.sampled_from((1, 1, 1, 5, 8)))], 262: [draw(st.sampled_from((0, 1, 1, 2, 2, 3, 5, 6, 8)))],
        279: [40_000],
    }  # fmt: skip
    names = (258, 273, 279, 280, 281, 284, 317, 322, 323, 324, 325, 338, 339, 340, 341)
    fields.update(draw(st.dictionaries(st.sampled_from(names), st.lists(numbers, min_size=1, max_size=4), max_size=2)))
    data = random.Random(num_colours).randbytes(40_000)
    directory, lists, start = b"", b"", 8 + len(data) + 2 + 12 * len(fields) + 4
    for name, values in sorted(fields.items()):
        kind, code = (11, "f") if name in (340, 341) and draw(st.booleans()) else (4, "I")
        raw = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(raw) > 4:
            lists, raw = lists + raw, struct.pack(f"{order}I", start + len(lists))
        count = draw(st.sampled_from((len(values),) * 99 + (2**30,)))
        directory += struct.pack(f"{order}HHI", name, kind, count) + raw
    first = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return first + data + struct.pack(f"{order}H", len(fields)) + directory + bytes(4) + lists


@st.composite
def netpbm(draw: Any) -> bytes:
    magic, most = draw(st.sampled_from(("P1", "P2", "P3", "P4", "P5", "P6", "Pf"))), draw(numbers)
    return f"{magic} {draw(sizes)} {draw(sizes)} {most}\n".encode() + draw(st.binary(max_size=99)) * 99


@st.composite
def icon(draw: Any) -> bytes:
    image, side, num_images = draw(png()), draw(st.integers(0, 255)), draw(st.sampled_from((1, 1, 1, 0, 2)))
    start = draw(st.sampled_from((22, 22, 22, 0, 38, 2**31)))
    return struct.pack("<HHHBBBBHHII", 0, 1, num_images, side, 32, 0, 0, 1, 32, len(image), start) + image


@st.composite
def saved(draw: Any) -> bytes:
    """What Pillow writes of each mode in each format that can hold it; nothing where it cannot."""
    mode = draw(st.sampled_from(("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "LA", "PA", "I", "I;16", "F")))
    kind = draw(st.sampled_from(ANY_FORMAT))
    picture = Image.new(mode, (draw(st.integers(1, 40)), 33), draw(st.integers(0, 2**16)) if mode in "IF" else 0)
    stream = io.BytesIO()
    with contextlib.suppress(Exception):
        picture.save(stream, kind, **draw(st.sampled_from(({}, {"transparency": 0}, {"progressive": True}))))
    return stream.getvalue()


def archives(image: bytes) -> dict[str, bytes]:
    files = {f"{split}/{name}/{i}.png": image for split in ("train", "test") for name in "ab" for i in range(2)}
    found = {}
    for suffix in (".tar", ".tar.gz", ".tar.xz"):
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            stream = io.BytesIO()
            mode = {".tar": "w", ".tar.gz": "w:gz", ".tar.xz": "w:xz"}[suffix]
            with tarfile.open(fileobj=stream, mode=mode, format=form) as tar:
                for name, data in files.items():
                    member = tarfile.TarInfo(f"{'long' * 40}/{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            found[f"{form}{suffix}"] = stream.getvalue()
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        found[f"{compression}.zip"] = stream.getvalue()
    return found


# ---- archives with links ----

names = st.tuples(st.sampled_from(("train", "test", "x")), st.sampled_from("abc"), st.sampled_from("012")).map(
    lambda parts: "/".join(parts) + ".png"
)
targets_of_links = names | st.sampled_from(
    ("0.png", "../a/0.png", "../../train/a/0.png", "a", "..", ".", "", "/", "train", "../../../secret.png",
     "../secret.png", "secret.png", "/etc/passwd", "/dev/zero", "é" * 300, "a/" * 3000)
)  # fmt: skip
KINDS_OF_MEMBERS = (
    tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
members = st.lists(
    st.tuples(names | names.map(lambda name: name[:-6]), st.sampled_from(KINDS_OF_MEMBERS), targets_of_links),
    max_size=9,
)


def linked(image: bytes, extra: list[tuple[str, bytes, str]], is_zip: bool) -> bytes:
    """An archive of a sound tree and of `extra` members (name, kind of a tar's, target)."""
    good = [(f"{split}/{name}/0.png", tarfile.REGTYPE, "") for split in ("train", "test") for name in "ab"]
    stream = io.BytesIO()
    if is_zip:
        with zipfile.ZipFile(stream, "w") as archive:
            for name, kind, target in [*good, *extra]:
                info = zipfile.ZipInfo(name)
                is_link = kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)
                info.external_attr = (0o120777 if is_link else 0o100644) << 16
                archive.writestr(info, target.encode() if is_link else image)
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind, target in [*good, *extra]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(image) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(image))
    return stream.getvalue()
