"""Encoded images to pixels: which files are images, how one is decoded, and how many are decoded at once. Where the
bytes come from is in tree.py."""

import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from lit_cifar.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_BYTES = 3 * 32 * 32
MAX_PIXELS = 2**26  # of one image: decoding 100 million with transparency takes 0.9 GB in each thread
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


def decode_image(data: bytes, formats: tuple[str, ...] | None = None) -> tuple[bytes, bool]:
    """One encoded image to 3072 bytes (3, 32, 32) RGB 0..255, and whether it had to be resized.

    Args:
        data: the image's file.
        formats: those of Pillow's formats that it may have; None for any.

    Raises:
        UserError: it cannot be decoded; the message is the rest of a sentence that begins with the image's name.
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
