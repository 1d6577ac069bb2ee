"""Encoded images to pixels, bounded in memory and time: which files are images, how one is read and decoded, how many
are decoded at once. Which files there are is in tree.py, what their values mean in pixels.py."""

import errno
import functools
import io
import os
import select
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lit_cifar.data.members import MAX_MEMBER_BYTES
from lit_cifar.data.pixels import to_rgb
from lit_cifar.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
R = TypeVar("R")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# The rest of Pillow's run programs (EPS), hold values of unknown range (FITS), or decode in Python, where a file of
# some KB can take minutes (QOI).
ANY_FORMAT = (
    *IMAGE_FORMATS,
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "PSD", "SGI", "TGA", "TIFF",
)  # fmt: skip
IMAGE_BYTES = 3 * 32 * 32
MAX_PIXELS = 2**26  # of one image: decoding so many with transparency takes 0.55 GB in each thread
MAX_SCANNED = 100 * MAX_PIXELS  # pixels times scans of a progressive JPEG: 95 bytes are a scan, and take 40 ms at most
MAX_LISTED = 2**20  # numbers in a list of a TIFF; Pillow makes objects of some 250 bytes for each
TIFF_STARTS = (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+")  # that Pillow takes for a TIFF
BYTE_KINDS = (1, 2, 6, 7)  # of TIFF's lists, those that Pillow leaves as bytes
TOO_LARGE = f"has more than the {MAX_MEMBER_BYTES} bytes that an image may have; shrink or remove it"
SILENT_SECONDS = 60  # that a pipe may give nothing
# From here on decoding goes to threads. PIL holds the GIL for all but the pixel work: two threads take 1.7x as long
# as one for 32x32 JPEGs (0.9 KB), 0.8x at 15 KB and 0.5x at 55 KB (2 cores, Pillow 13.0, Python 3.11).
THREADED_BYTES = 16 * 2**10


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


def read_image(path: str, may_be_pipe: bool = False) -> bytes:
    """A file of at most MAX_MEMBER_BYTES bytes, be it endless, and without waiting long for what never comes.

    Raises:
        UserError: it is too large, or no file; the message is the rest of a sentence that begins with its name.
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        is_pipe = stat.S_ISFIFO(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(status.st_mode) or (is_pipe and may_be_pipe)):
            raise UserError("is a pipe or a device, not a file")
        pieces: list[bytes] = []
        left = MAX_MEMBER_BYTES + 1
        if status.st_size >= left:
            raise UserError(TOO_LARGE)
        while left:
            if is_pipe and not select.select([file], [], [], SILENT_SECONDS)[0]:
                raise UserError(f"is a pipe that gave nothing for {SILENT_SECONDS} s")
            piece = file.read(min(left, max(status.st_size + 1, 2**16)))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            left -= len(piece)
    raise UserError(TOO_LARGE)


def is_image(data: bytes) -> bool:
    """Whether `decode_image` would take `data` for an image, damaged or not."""
    from PIL import Image

    try:
        _opened(data, None).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # as decode_image says, PIL raises anything
        return False
    return True


def decode_image(data: bytes, formats: tuple[str, ...] | None = None) -> tuple[bytes, bool]:
    """One encoded image to 3072 bytes (3, 32, 32) RGB 0..255, and whether it had to be resized.

    Of several frames or pages it is the first. Colour profiles are left alone.

    Args:
        data: the image's file.
        formats: those of Pillow's formats that it may have; None for ANY_FORMAT.

    Raises:
        UserError: it cannot be decoded; the message is the rest of a sentence that begins with the image's name.
    """
    from PIL import Image

    if len(data) > MAX_MEMBER_BYTES:
        raise UserError(TOO_LARGE)
    try:
        return _resized(to_rgb(_opened(data, formats), data))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError("has far too many pixels") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more for damage
        known = "JPEG, PNG or WebP" if formats == IMAGE_FORMATS else "an image"
        raise UserError(f"cannot be decoded as {known}") from error


def pixels_of(image: "Image.Image") -> bytes:
    """As `decode_image`, of an image that somebody made or opened, which stays as it is.

    One that is opened and not yet read is decoded from its file: what that says of its values is lost in reading.

    Raises:
        UserError: as of decode_image.
    """
    file: Any = getattr(image, "fp", None)
    try:
        if not (file and getattr(image, "tile", None)) or image.tell():  # a later frame
            return _resized(to_rgb(image.copy(), b""))[0]
        place = file.tell()
        file.seek(0)
        data = file.read(MAX_MEMBER_BYTES + 1)
        file.seek(place)
    except UserError:
        raise
    except Exception as error:  # its file is closed, or damaged
        raise UserError("cannot be decoded as an image") from error
    return decode_image(data)[0]


def _resized(image: "Image.Image") -> tuple[bytes, bool]:
    """An RGB image to 3072 bytes (3, 32, 32), and whether it had another size."""
    from PIL import Image

    resized = image.size != (32, 32)
    if resized:
        image = image.resize((32, 32), Image.Resampling.BICUBIC)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(32, 32, 3).transpose(2, 0, 1).tobytes(), resized


def _opened(data: bytes, formats: tuple[str, ...] | None) -> "Image.Image":
    """The image, of which no more than its header is read; DecompressionBombError if the rest would take too much."""
    from PIL import Image

    if formats is None:
        _check_before_opening(data)
    image: Any = Image.open(io.BytesIO(data), formats=formats or _any_format())
    num_pixels = image.width * image.height
    if image.format == "TIFF":  # tiles are decoded whole, however small the image is
        num_pixels = max(num_pixels, image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0))
    num_scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if num_pixels > MAX_PIXELS or num_pixels * num_scans > MAX_SCANNED:
        raise Image.DecompressionBombError
    return image


def _check_before_opening(data: bytes) -> None:
    """DecompressionBombError for files that take too much as soon as Pillow opens them."""
    from PIL import Image

    if data[:4] in TIFF_STARTS and _longest_list(data) > MAX_LISTED:
        raise Image.DecompressionBombError
    if data[:4] == b"\0\0\1\0" and _most_pixels_of_icon(data) > MAX_PIXELS:
        raise Image.DecompressionBombError


def _longest_list(data: bytes) -> int:
    """The numbers in the longest list of a TIFF's first directory."""
    is_big = data[2] == 43
    order = "<" if data[:2] == b"II" else ">"
    offset, length, entry = ("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")
    (place,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
    (num_entries,) = struct.unpack_from(order + length, data, place)
    place += struct.calcsize(order + length)
    last = min(place + num_entries * struct.calcsize(order + entry), len(data))
    entries = struct.iter_unpack(order + entry, data[place : last - (last - place) % struct.calcsize(order + entry)])
    return max((count for _, kind, count, _ in entries if kind not in BYTE_KINDS), default=0)


def _most_pixels_of_icon(data: bytes) -> int:
    """Pixels of the largest image in an ICO by its own header, whatever the icon's says of it."""
    most = 0
    for number in range(struct.unpack_from("<H", data, 4)[0]):
        (start,) = struct.unpack_from("<I", data, 6 + 16 * number + 12)
        is_png = data[start : start + 8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack_from(">II" if is_png else "<ii", data, start + (16 if is_png else 4))
        most = max(most, abs(width * height))
    return most


@functools.cache
def _any_format() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in ANY_FORMAT if name in Image.OPEN)  # Pillow reads AVIF since 11.3
