"""Decoding: a value gets the brightness that its file states, or the file is refused; nothing takes much memory."""

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import error_of, make_tree
from PIL import Image

from lit_cifar.data import images as images_module
from lit_cifar.data.images import ANY_FORMAT, IMAGE_FORMATS, MAX_MEMBER_BYTES, decode_image, is_image, read_image
from lit_cifar.data.tree import Tree

Array = np.ndarray[Any, Any]
GREY = np.arange(1024).reshape(32, 32)  # a ramp, which shows every mistake of a scale
UNKNOWN = r"white; scale its values to 8 bits and save it again"


def decoded(data: bytes) -> Array:
    """An encoded image's pixels (32, 32, 3), as trees and predict get them."""
    pixels, resized = decode_image(data)
    assert not resized
    return np.frombuffer(pixels, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: Array, bits: int, *chunks: bytes, width: int = 32) -> bytes:
    """A PNG (H, W) or (H, W, C) of 1 to 16 bits a value; `chunks` stand before its data, after its header."""
    values = values.reshape(values.shape[0], width, -1)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    if bits < 8:
        flat = np.unpackbits(values.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
        rows = np.packbits(flat.reshape(values.shape[0], -1), axis=1)
    else:
        rows = values.astype(">u2" if bits == 16 else "u1").reshape(values.shape[0], -1)
    header = struct.pack(">IIBBBBB", width, values.shape[0], bits, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", packed), chunk(b"IEND", b""))
    )


def tiff(data: bytes, bits: int, order: str = "<", num_colours: int = 1, **tags: Any) -> bytes:
    """An uncompressed TIFF of 32x32 pixels; of `tags`, a float is one, an int a number of 16 or 32 bits."""
    names = {
        "photometric": 262, "sample_format": 339, "least": 340, "most": 341, "most_used": 281, "planar": 284,
        "extra": 338, "tile_width": 322, "tile_length": 323, "tiles": 324,
    }  # fmt: skip
    found = {
        256: [32], 257: [32], 258: [bits] * num_colours, 259: [1], 262: [1 if num_colours == 1 else 2],
        277: [num_colours], 278: [32], 279: [len(data)], 273: [8],
    }  # fmt: skip
    found.update({names[name]: value if isinstance(value, list) else [value] for name, value in tags.items()})
    if tags.get("planar") == 2:
        found[273], found[279] = [8 + 2048 * i for i in range(3)], [2048] * 3
    entries, lists = b"", b""
    start = 8 + len(data)
    for name, numbers in sorted(found.items()):
        code = 11 if isinstance(numbers[0], float) else 3 if name in (258, 259, 262, 277, 281, 284, 338, 339) else 4
        raw = struct.pack(f"{order}{len(numbers)}{'fHI'[(11, 3, 4).index(code)]}", *numbers)
        if len(raw) > 4:
            place = start + 2 + 12 * len(found) + 4 + len(lists)
            lists += raw
            raw = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", name, code, len(numbers)) + raw.ljust(4, b"\0")
    first = struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(found)) + entries + struct.pack(f"{order}I", 0)
    return (b"II*\0" if order == "<" else b"MM\0*") + first + data + directory + lists


def pgm(values: Array, most: int) -> bytes:
    colours = b"P6" if values.ndim == 3 else b"P5"
    return b"%s 32 32 %d\n" % (colours, most) + values.astype(">u2" if most > 255 else "u1").tobytes()


def packed12(values: Array) -> bytes:
    first, second = values.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


# ---- wide values ----

FULL, TWELVE = GREY * 64 + 63, GREY * 4 + 3  # up to 65535 and 4095
FLOATS = (GREY / 1023).astype(np.float32)
PFM = b"Pf 32 32 -1\n" + FLOATS[::-1].astype("<f4").tobytes()
STATED: dict[str, tuple[bytes, Array]] = {
    "PNG of 16 bits": (png(FULL, 16), FULL >> 8),
    "PNG of 16 bits and alpha": (png(np.dstack([FULL, np.full_like(FULL, 65535)]), 16), FULL >> 8),
    "PNG of 16 bits in colour": (png(np.dstack([FULL] * 3), 16), FULL >> 8),
    "PNG, dark, with all bits in use": (png(TWELVE, 16, chunk(b"sBIT", b"\x10")), TWELVE >> 8),
    "PNG, dark, coloured, with all bits in use": (
        png(np.dstack([TWELVE] * 3), 16, chunk(b"sBIT", b"\x10" * 3)),
        TWELVE >> 8,
    ),
    "PNG of 12 bits, spread as PNG wants it": (png(TWELVE << 4 | TWELVE >> 8, 16, chunk(b"sBIT", b"\x0c")), FULL >> 8),
    "PNG that is black": (png(GREY * 0, 16), GREY * 0),
    "PNG of 4 bits": (png(GREY // 64, 4), GREY // 64 * 17),
    "PNG of 1 bit": (png(GREY // 512, 1), GREY // 512 * 255),
    "TIFF of 16 bits": (tiff(FULL.astype("<u2").tobytes(), 16), FULL >> 8),
    "TIFF of 16 bits, the other order": (tiff(FULL.astype(">u2").tobytes(), 16, ">"), FULL >> 8),
    "TIFF of 12 bits": (tiff(packed12(TWELVE), 12), TWELVE >> 4),
    "TIFF of 12 bits in 16": (tiff(TWELVE.astype("<u2").tobytes(), 16, most=4095), TWELVE >> 4),
    "TIFF of 12 bits in 16, the older tag": (tiff(TWELVE.astype("<u2").tobytes(), 16, most_used=4095), TWELVE >> 4),
    "TIFF of 8 bits in 16": (tiff((GREY >> 2).astype("<u2").tobytes(), 16, most=255), GREY >> 2),
    "TIFF of 1 bit in 16": (tiff((GREY >> 9).astype("<u2").tobytes(), 16, most=1), (GREY >> 9) * 255),
    "TIFF, dark, that says so": (tiff(TWELVE.astype("<u2").tobytes(), 16, most=65535), TWELVE >> 8),
    "TIFF of 15 bits with a sign": (
        tiff((FULL >> 1).astype("<i2").tobytes(), 16, sample_format=2, most=32767),
        FULL >> 8,
    ),
    "TIFF of 32 bits": (tiff((FULL << 16).astype("<u4").tobytes(), 32), FULL >> 8),
    "TIFF of 16 bits in 32": (tiff(FULL.astype("<u4").tobytes(), 32, most=65535), FULL >> 8),
    "TIFF of floats": (tiff(FLOATS.tobytes(), 32, sample_format=3), np.rint(FLOATS * 255)),
    "TIFF of floats to 255": (
        tiff((FLOATS * 255).astype("<f4").tobytes(), 32, sample_format=3, most=255.0),
        np.rint(FLOATS * 255),
    ),
    "TIFF of 16 bits in colour": (tiff(np.dstack([FULL] * 3).astype("<u2").tobytes(), 16, num_colours=3), FULL >> 8),
    "PGM of 16 bits": (pgm(FULL, 65535), FULL >> 8),
    "PGM of 12 bits": (pgm(TWELVE, 4095), np.round(TWELVE / 4095 * 65535).astype(int) >> 8),
    "PGM of 4 bits": (pgm(GREY // 64, 15), GREY // 64 * 17),
    "PGM, dark, of 12 bits": (pgm(TWELVE // 16, 4095), np.round(TWELVE // 16 / 4095 * 65535).astype(int) >> 8),
    "PPM of 12 bits": (pgm(np.dstack([TWELVE] * 3), 4095), np.round(TWELVE / 4095 * 255)),
    "PFM": (PFM, np.rint(FLOATS * 255)),
}


@pytest.mark.parametrize("name", STATED)
def test_wide_values_have_the_brightness_that_the_file_states(name: str) -> None:
    data, grey = STATED[name]
    assert np.array_equal(decoded(data), np.dstack([grey] * 3).astype(np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 8, 10, 12, 14])
def test_few_bits_in_sixteen_are_refused(bits: int) -> None:
    """Neither read as black nor stretched by what this one image reaches."""
    values = GREY * 2**bits // 1024
    colours = np.dstack([values] * 3)
    for data in (
        png(values, 16),
        png(values, 16, chunk(b"sBIT", bytes([bits]))),
        png(np.dstack([values, np.full_like(values, 65535)]), 16),
        png(np.dstack([colours, np.full_like(values, 65535)]), 16),
        png(colours, 16),
        tiff(values.astype("<u2").tobytes(), 16),
        tiff(values.astype("<u2").tobytes(), 16, most=2**bits + 2),  # what it reaches, not a range
        tiff(colours.astype("<u2").tobytes(), 16, num_colours=3),
        tiff(values.astype("<u4").tobytes(), 32),
        pgm(values, 65535),
        pgm(colours, 65535),
    ):
        assert error_of(decode_image, data).endswith(UNKNOWN)


REFUSED = {
    "signed, 8 bits": tiff((GREY >> 2).astype(np.uint8).tobytes(), 8, sample_format=2),
    "signed, 16 bits": tiff((FULL - 32768).astype("<i2").tobytes(), 16, sample_format=2),
    "signed, of positive values": tiff((FULL >> 1).astype("<i2").tobytes(), 16, sample_format=2),
    "signed, 32 bits": tiff((FULL << 15).astype("<i4").tobytes(), 32, sample_format=2),
    "floats above 1": tiff((FLOATS * 255).tobytes(), 32, sample_format=3),
    "floats to what this image reaches": tiff((FLOATS * 3).tobytes(), 32, sample_format=3, most=3.5),
    "floats below 0": tiff((FLOATS - np.float32(0.5)).tobytes(), 32, sample_format=3),
    "floats from -1 to 1": tiff(FLOATS.tobytes(), 32, sample_format=3, least=-1.0, most=1.0),
    "not a number": tiff(np.where(GREY == 3, np.nan, FLOATS).astype("<f4").tobytes(), 32, sample_format=3),
    "infinite": tiff(np.where(GREY == 3, np.inf, FLOATS).astype("<f4").tobytes(), 32, sample_format=3),
    "above what it states": tiff(FULL.astype("<u2").tobytes(), 16, most=4095),
    "colours of 12 bits": tiff(np.dstack([TWELVE] * 3).astype("<u2").tobytes(), 16, num_colours=3, most=[4095] * 3),
    "floats with a scale": PFM.replace(b" -1\n", b" -7\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_known_is_refused(name: str) -> None:
    assert error_of(decode_image, REFUSED[name]).endswith(UNKNOWN)


def test_what_pillow_reads_wrong_is_refused() -> None:
    inverted = tiff(FULL.astype("<u2").tobytes(), 16, photometric=0)
    assert error_of(decode_image, inverted) == "has 16-bit values with 0 for white; invert it and save it again"
    apart = tiff(np.stack([FULL] * 3).astype("<u2").tobytes(), 16, num_colours=3, planar=2)
    assert "keeps 16-bit colours apart" in error_of(decode_image, apart)
    key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert "has a transparent colour of 16 bits" in error_of(decode_image, png(np.dstack([FULL] * 3), 16, key))


def test_a_tree_names_the_image_that_it_refuses() -> None:
    tree = make_tree(Path("tree"), ("a", "b"))
    (tree / "test" / "b" / "0.png").write_bytes(png(TWELVE, 16))
    assert error_of(Tree(tree).read, True).startswith(
        f"{tree}: test/b/0.png has 16-bit values up to 4095 of 65535, so "
    )


def test_precision_of_jpeg_2000_is_its_range() -> None:
    if "JPEG2000" not in Image.SAVE and not Image.init() and "JPEG2000" not in Image.SAVE:
        pytest.skip("this Pillow writes no JPEG 2000")
    data = encoded(Image.fromarray(FULL.astype(np.uint16)), "JPEG2000", irreversible=False)
    assert np.array_equal(decoded(data)[..., 0], FULL >> 8)
    assert error_of(decode_image, encoded(Image.fromarray(TWELVE.astype(np.uint16)), "JPEG2000")).endswith(UNKNOWN)


# ---- colours ----


def test_every_mode_is_seen_as_pillow_shows_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    rgb, ramp = Image.fromarray(noise[..., :3]), Image.fromarray((GREY >> 2).astype(np.uint8))
    bits = ramp.convert("1")
    palette = rgb.quantize(16)
    for image, kind in ((rgb, "BMP"), (rgb, "TIFF"), (rgb, "PPM"), (rgb, "TGA"), (rgb, "SGI"), (rgb, "PCX"),
                        (palette, "GIF"), (palette, "PNG"), (palette, "TIFF"), (bits, "PNG"), (bits, "TIFF"),
                        (bits, "PPM"), (ramp, "TIFF"), (ramp, "SGI")):  # fmt: skip
        assert np.array_equal(decoded(encoded(image, kind)), np.asarray(image.convert("RGB"))), (image.mode, kind)
    cyan = Image.merge("CMYK", Image.fromarray(noise).split())
    inks = (255 - noise[..., :3].astype(int)) * (255 - noise[..., 3:].astype(int)) / 255
    assert np.abs(decoded(encoded(cyan, "TIFF")) - inks).max() <= 1
    plain = Image.new("CMYK", (32, 32), (10, 200, 30, 40))  # which Pillow inverts in a JPEG, as Adobe does
    assert np.abs(decoded(encoded(plain, "JPEG")) - np.array([245, 55, 225]) * 215 / 255).max() <= 2
    ycc = rgb.convert("YCbCr")
    wanted = np.asarray(ycc.convert("RGB")).astype(int)
    assert np.abs(decoded(encoded(ycc, "JPEG", quality=100, subsampling=0)) - wanted).max() <= 8


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_of_several_frames_is_read(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decoded(data), np.asarray(frames[0]))


def test_exif_after_the_pixels_counts_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    data = png(GREY >> 2, 8)
    data = data[:-12] + block + data[-12:]
    assert np.array_equal(decoded(data)[..., 0], np.rot90(GREY >> 2, -1))


def test_exif_as_imagemagick_writes_it_into_a_png_counts_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    text = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
    data = png(GREY >> 2, 8, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    assert np.array_equal(decoded(data)[..., 0], np.rot90(GREY >> 2, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_turns_nothing_and_costs_no_image(kind: str) -> None:
    image = Image.fromarray((GREY >> 2).astype(np.uint8)).convert("RGB")
    options: dict[str, Any] = {"WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(image, kind, exif=b"Exif\0\0not a TIFF at all", **options)
    assert np.array_equal(decoded(data), decoded(encoded(image, kind, **options)))


def test_black_ink_of_16_bits_is_a_colour_too() -> None:
    inks = np.dstack([np.zeros_like(FULL)] * 3 + [FULL]).astype("<u2")
    data = tiff(inks.tobytes(), 16, num_colours=4, photometric=5)
    assert np.abs(decoded(data)[..., 0].astype(int) - (255 - (FULL >> 8))).max() <= 1


# ---- transparency: on white ----


@pytest.mark.parametrize("kind", ["TGA", "TIFF"])
def test_a_fourth_byte_that_no_file_calls_alpha_hides_nothing(kind: str) -> None:
    padded = NOISE.copy()
    padded[..., 3] = 0
    stated = encoded(Image.fromarray(padded), kind)
    assert (decoded(stated) == 255).all()
    unstated = bytearray(stated)
    unstated[17] &= 0xF0
    data = tiff(padded.tobytes(), 8, num_colours=4, photometric=2) if kind == "TIFF" else bytes(unstated)
    assert np.array_equal(decoded(data), NOISE[..., :3])


def on_white(colours: Array, alpha: Array) -> Array:
    """(H, W, 3) 0..255 over white, by alpha (H, W) 0..255."""
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


NOISE = np.random.default_rng(1).integers(0, 256, (32, 32, 4), np.uint8)
NOISE[:8, :, 3] = 0  # colours that are hidden
NOISE[8:16, :, 3] = 255
GREY8 = NOISE[..., 0]


def transparent(kind: str) -> tuple[bytes, Array]:
    colours, alpha = NOISE[..., :3], NOISE[..., 3]
    if kind in ("PNG", "WEBP", "TIFF", "TGA", "ICO", "DDS", "JPEG2000", "SGI"):
        options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
        return encoded(Image.fromarray(NOISE), kind, **options), on_white(colours, alpha)
    if kind == "grey and alpha":
        return png(np.dstack([GREY8, alpha]), 8), on_white(np.dstack([GREY8] * 3), alpha)
    if kind == "16 bits, grey and alpha":
        return png(np.dstack([GREY8, alpha]).astype(int) * 257, 16), on_white(np.dstack([GREY8] * 3), alpha)
    if kind == "16 bits and alpha":
        return png(NOISE.astype(int) * 257, 16), on_white(colours, alpha)
    if kind == "premultiplied":  # TIFF of RGBa
        stored = np.dstack([np.round(colours * (alpha[..., None] / 255)).astype(np.uint8), alpha])
        return tiff(stored.tobytes(), 8, num_colours=4, extra=1), on_white(colours, alpha)
    if kind == "premultiplied grey":  # TIFF of La
        stored = np.dstack([np.round(GREY8 * (alpha / 255)).astype(np.uint8), alpha])
        grey_on_white = on_white(np.dstack([GREY8] * 3), alpha)
        return tiff(stored.tobytes(), 8, num_colours=2, photometric=1, extra=1), grey_on_white
    grey = GREY8 // 16
    shown = np.dstack([grey * 17] * 3)
    if kind == "one grey of 4 bits":
        return png(grey, 4, chunk(b"tRNS", struct.pack(">H", 5))), on_white(shown, np.where(grey == 5, 0, 255))
    if kind == "one grey of 8 bits":
        return png(GREY8, 8, chunk(b"tRNS", struct.pack(">H", 5))), on_white(
            np.dstack([GREY8] * 3), np.where(GREY8 == 5, 0, 255)
        )
    if kind == "one grey of 16 bits":
        wide = GREY8.astype(int) * 257
        return png(wide, 16, chunk(b"tRNS", struct.pack(">H", 5 * 257))), on_white(
            np.dstack([GREY8] * 3), np.where(GREY8 == 5, 0, 255)
        )
    if kind == "one colour":
        key = tuple(int(value) for value in colours[3, 4])
        hidden = (colours == colours[3, 4]).all(2)
        return png(colours, 8, chunk(b"tRNS", struct.pack(">HHH", *key))), on_white(colours, np.where(hidden, 0, 255))
    palette = Image.fromarray(colours).quantize(16)
    index, table = np.asarray(palette), np.asarray(palette.convert("RGB"))
    if kind == "alphas of a palette":
        return encoded(palette, transparency=bytes(range(0, 256, 16))), on_white(table, index.astype(int) * 16)
    assert kind in ("one of a palette", "GIF")
    data = encoded(palette, "GIF" if kind == "GIF" else "PNG", transparency=3)
    return data, on_white(table, np.where(index == 3, 0, 255))


@pytest.mark.parametrize(
    "kind",
    [
        "PNG", "WEBP", "TIFF", "TGA", "ICO", "DDS", "JPEG2000", "SGI", "grey and alpha", "16 bits, grey and alpha",
        "16 bits and alpha", "premultiplied", "premultiplied grey", "one grey of 4 bits", "one grey of 8 bits",
        "one grey of 16 bits", "one colour", "alphas of a palette", "one of a palette", "GIF",
    ],
)  # fmt: skip
def test_transparency_shows_white(kind: str) -> None:
    if kind == "JPEG2000" and not Image.init() and "JPEG2000" not in Image.SAVE:
        pytest.skip("this Pillow writes no JPEG 2000")
    data, wanted = transparent(kind)
    if kind == "premultiplied grey" and not is_image(data):
        pytest.skip("this Pillow reads no TIFF of that kind")
    assert np.abs(decoded(data) - wanted).max() <= (2 if "premultiplied" in kind else 1)  # values rounded twice
    assert (decoded(data)[:8] == 255).all() or "one" in kind or "palette" in kind or kind == "GIF", "hidden colours"


def test_edges_are_composited_before_the_image_is_made_small() -> None:
    large = np.random.default_rng(2).integers(0, 256, (96, 64, 4), np.uint8)
    flat = Image.fromarray(np.rint(on_white(large[..., :3], large[..., 3])).astype(np.uint8))
    wanted = np.asarray(flat.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    pixels, resized = decode_image(encoded(Image.fromarray(large)))
    assert resized
    shown = np.frombuffer(pixels, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.abs(shown - wanted).max() <= 2


# ---- bounded in memory and time ----


def deflated(num_bytes: int) -> bytes:
    packer, piece = zlib.compressobj(1), bytes(2**20)
    return b"".join(packer.compress(piece) for _ in range(num_bytes // 2**20)) + packer.flush()


def icon(image: bytes) -> bytes:
    """An ICO that says its image has 32x32 pixels."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(image), 22) + image


def bombs() -> dict[str, tuple[bytes, str]]:
    many, undecodable = "has far too many pixels", "cannot be decoded as an image"
    packed = deflated(13_000 * (13_000 * 4 + 1))
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0)
    big = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    dib = struct.pack("<IiiHHIIiiII", 40, 13_000, 26_000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(100)
    scans = encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    scan = scans[scans.rindex(b"\xff\xda") : -2]
    text = chunk(b"zTXt", b"a\0\0" + deflated(2**27))
    profile = chunk(b"iCCP", b"a\0\0" + deflated(2**27))
    tile = {"tile_width": 20_000, "tile_length": 20_000, "tiles": [8]}
    return {
        "icon with a PNG": (icon(big), many),
        "icon with a bitmap": (icon(dib), many),
        "icon that is cut short": (icon(big)[:40], undecodable),
        "TIFF with a tile": (tiff(b"\0" * 3072, 8, num_colours=3, **tile), many),
        "TIFF with a list": (tiff(b"\0" * 3072, 8, num_colours=3, tiles=[8] * (2**20 + 1)), many),
        "JPEG of scans": (scans[:-2] + scan * 7000 + b"\xff\xd9", many),
        "PNG with a text": (png(GREY >> 2, 8, text), undecodable),
        "PNG with a profile": (png(GREY >> 2, 8, profile), undecodable),
        "too many bytes": (png(GREY >> 2, 8) + bytes(MAX_MEMBER_BYTES), f"has more than the {MAX_MEMBER_BYTES} bytes "),
    }


MEASURED = """
import sys, resource, warnings
from pathlib import Path
from lit_cifar.data.images import decode_image
from lit_cifar.errors import UserError
warnings.simplefilter("error")
decode_image(Path("good").read_bytes())
resource.setrlimit(resource.RLIMIT_AS, (2**31 + 2**30, -1))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_image(Path(path).read_bytes())
        error = "decoded"
    except UserError as failed:
        error = str(failed)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error, sep="\\t")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_headers_that_understate_take_no_memory() -> None:
    found = bombs()
    for number, (data, _) in enumerate(found.values()):
        Path(str(number)).write_bytes(data)
    Path("good").write_bytes(png(GREY >> 2, 8))
    env = {**os.environ, "PYTHONPATH": str(Path(images_module.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, range(len(found)))],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(found), done.stderr
    for (grown, error), (name, (data, message)) in zip(lines, found.items(), strict=True):
        assert error.startswith(message), name
        assert int(grown) < 64 + len(data) / 2**20, name


def test_text_is_no_image() -> None:
    for text in (b"MM/a.png\n", b"II*/a.png", b"photos/a.png\nphotos/b.png\n", b"P6.png", b"GIF89a.gif", b""):
        assert not is_image(text), text
    assert is_image(png(GREY >> 2, 8))


def test_formats_are_those_of_this_pillow() -> None:
    Image.init()
    assert set(ANY_FORMAT) - {"AVIF"} <= set(Image.OPEN)
    assert set(IMAGE_FORMATS) <= set(ANY_FORMAT)


# ---- files that are none ----


def test_a_file_is_read_to_its_bound() -> None:
    Path("whole").write_bytes(b"x" * 100_000)
    assert read_image("whole") == b"x" * 100_000
    with open("sparse", "wb") as file:
        file.truncate(2**40)
    assert error_of(read_image, "sparse").startswith(
        f"has more than the {MAX_MEMBER_BYTES} bytes that an image may have"
    )
    with pytest.raises(IsADirectoryError):
        read_image(".")
    for device in ("/dev/zero", "/dev/null"):
        if Path(device).exists():
            assert error_of(read_image, device, True) == "is a pipe or a device, not a file"


def test_a_file_that_grows_is_read_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_MEMBER_BYTES", 3_000_000)
    Path("grown").write_bytes(b"x" * 5_000_000)
    status = os.stat("grown")
    small = os.stat_result((*status[:6], 10, *status[7:10]))
    monkeypatch.setattr(os, "fstat", lambda handle: small)  # as it was when it was opened
    assert error_of(read_image, "grown").startswith("has more than the ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_read_where_it_may_be_one_and_never_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe")
    assert error_of(read_image, "pipe") == "is a pipe or a device, not a file"
    content = bytes(range(256)) * 1000

    def write() -> None:
        with open("pipe", "wb") as pipe:  # waits for the reader
            pipe.write(content[:1000])
            pipe.flush()
            time.sleep(0.1)
            pipe.write(content[1000:])

    writer = threading.Thread(target=write)
    writer.start()
    assert read_image("pipe", may_be_pipe=True) == content
    writer.join()
    monkeypatch.setattr(images_module, "SILENT_SECONDS", 0.1)
    assert error_of(read_image, "pipe", True) == "is a pipe that gave nothing for 0.1 s"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_an_endless_pipe_ends_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_MEMBER_BYTES", 2**20)
    os.mkfifo("pipe")
    with subprocess.Popen(["sh", "-c", "cat /dev/zero > pipe"]) as process:
        assert error_of(read_image, "pipe", True).startswith("has more than the ")
        process.wait(10)
