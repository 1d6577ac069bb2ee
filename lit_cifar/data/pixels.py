"""An opened image to 8-bit RGB: which value is white, what shows through transparency. images.py opens it."""

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_cifar.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

BACKGROUND = (255, 255, 255)  # behind transparency: white, as on a page, where drawings in black stay visible
RESCALE = "scale its values to 8 bits and save it again"
EXIF = ("exif", "Raw profile type exif")  # where Pillow puts it; ImageMagick writes the other into a PNG
GREY_STEPS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey values of so many bits to fill 0..255


class Samples(NamedTuple):
    """What a file says of its values, one for each pixel and colour."""

    bits: int = 8  # 8 for all that Pillow scales to 8 bits by itself
    white: int | None = None  # the value of white, where the file states it
    signed: bool = False


def to_rgb(image: "Image.Image", data: bytes) -> "Image.Image":
    """The image with 8 bits for red, green and blue, upright by its EXIF, on BACKGROUND where it is transparent.

    Wider values are read by the range that the file states: the maximum of a PGM, the bits and SMaxSampleValue or
    MaxSampleValue of a TIFF, the precision of a JPEG 2000, the sBIT of a PNG if it is 16. Floats without one reach from
    0 to 1, and unsigned integers as far as their bits. No image is stretched for being dark: it is refused if it states
    no range and stays below a quarter of what its bits hold, as the 8, 10, 12 or 14 bits of a sensor do in 16.

    Args:
        image: as Pillow opened it; nothing is decoded yet.
        data: the file that it was opened from.

    Raises:
        UserError: it cannot be known which value is white; the message is the rest of a sentence that begins with the
            image's name.
        Exception: of many kinds, for damage.
    """
    from PIL import ImageOps

    samples = _samples(image, data)
    step = GREY_STEPS.get(_raw_mode(image))
    image.load()
    if _has_unused(image, data):
        image = image.convert("RGB")
    if not image.info.keys().isdisjoint(EXIF):  # asking first saves 2 s on 60,000 JPEGs
        with suppress(Exception):  # damaged, as that of some cameras and editors is: of the pixels it says nothing
            image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if step and isinstance(key, int) and key <= 255 // step:  # of the grey that is transparent; Pillow scales the rest
        image.info["transparency"] = key * step
    if image.mode[0] in "IF":  # not IF: I, I;16, I;16B; F
        image = _narrowed(image, samples)
    elif samples.bits > 8:
        _check_upper_bytes(image, samples)
    return _opaque(image)


def _raw_mode(image: "Image.Image") -> str:
    """Pillow's name for how the file's values are laid out, such as RGB;16B; that is known until they are decoded."""
    tiles: Any = getattr(image, "tile", None) or [("", None, 0, "")]
    args = tiles[0][3]
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _samples(image: "Image.Image", data: bytes) -> Samples:
    if image.format == "TIFF":
        return _samples_of_tiff(image)
    if image.format == "PPM":
        return _samples_of_ppm(image)
    if image.format == "JPEG2000":  # 4 bytes, 38 more, then a component's bits less 1; Pillow scales to 8 or 16
        bits = (data[data.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1
        return Samples(16 if bits > 8 else 8, None if bits == 16 else 65535)
    is_wide_sgi = image.format == "SGI" and data[3] == 2  # bytes for each value
    wide = image.mode[0] in "IF" or is_wide_sgi or re.search(";16[BLN]$", _raw_mode(image))
    # PNG's sBIT is the depth before the values were spread over 16 bits. Many who write 12 do not spread them.
    is_known = image.format == "PNG" and b"sBIT\x10" in data[: data.find(b"IDAT")]
    return Samples(16 if wide else 8, 65535 if wide and is_known else None)


def _samples_of_ppm(image: Any) -> Samples:
    if image.mode == "F":
        if image.info.get("scale", 1) != 1:
            raise UserError(f"has floats with a scale of their own, so it is not known which is white; {RESCALE}")
        return Samples(32)
    codec, _, _, args = image.tile[0]
    if codec == "raw":
        return Samples(16 if image.mode[0] == "I" else 8)
    return Samples(16 if args[-1] > 255 else 8, None if args[-1] == 65535 else 65535)  # to which Pillow scales it


def _samples_of_tiff(image: Any) -> Samples:
    tags = image.tag_v2

    def numbers(default: float, *names: int) -> set[float]:
        value = next((tags[name] for name in names if name in tags), default)
        return set(value) if isinstance(value, tuple) else {value}

    bits, signed = int(max(numbers(1, 258))), 2 in numbers(1, 339)
    if signed and bits <= 8:
        raise UserError(f"has signed values, so it is not known which is white; {RESCALE}")
    if bits > 8 and 0 in numbers(0, 262):
        raise UserError(f"has {bits}-bit values with 0 for white; invert it and save it again")
    if bits > 8 and len(image.getbands()) > 1 and 2 in numbers(1, 284):  # Pillow takes the bytes for 8-bit values
        raise UserError(f"keeps {bits}-bit colours apart, which cannot be read; save it with its colours interleaved")
    if bits == 12:
        return Samples(bits, 4095)
    # A limit of some bits is a range; anything else is what this image happens to reach.
    most, least = numbers(0, 341, 281), numbers(0, 340, 280)
    white = int(max(most)) if max(most) < 2**32 else 0
    is_range = most == {white} and white & (white + 1) == 0 and least == {0}
    return Samples(bits, white if is_range and white else None, signed or min(least) < 0)


def _narrowed(image: "Image.Image", samples: Samples) -> "Image.Image":
    """A grey image of integers or floats with 8 bits, by the file's range."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        white = samples.white or 1
    else:
        white = samples.white or 2**samples.bits - 1
        if samples.bits == 32 and not samples.signed:  # which Pillow reads as signed
            values = values.view(np.uint32)
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= white) or (samples.signed and samples.white is None):  # not: NaN is neither
        raise UserError(f"has values from {lowest:g} to {highest:g}, and none is known to be white; {RESCALE}")
    if image.mode == "F":
        pixels = np.rint(values * np.float32(255 / white))
    elif white < 256:
        pixels = values.astype(np.uint32) * 255 // white
    else:
        if samples.white is None and 0 < highest <= white // 4:
            raise UserError(_too_dark(f"{highest:g} of {white}", samples.bits))
        pixels = values >> (white.bit_length() - 8)
    narrowed = Image.fromarray(pixels.astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):  # the value that is transparent
        return Image.merge("LA", (narrowed, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    return narrowed


def _check_upper_bytes(image: "Image.Image", samples: Samples) -> None:
    """Refuses colours of which Pillow kept the upper byte, the lower one being that which counts."""
    if "transparency" in image.info:
        raise UserError(f"has a transparent colour of {samples.bits} bits; save it with an alpha channel or 8 bits")
    if samples.white not in (None, 65535):
        raise UserError(f"has {samples.bits}-bit colours of which {samples.white} is white; {RESCALE}")
    extrema: Any = image.getextrema()
    of_bands = extrema if isinstance(extrema[0], tuple) else [extrema]
    highest = max(high for band, (_, high) in zip(image.getbands(), of_bands, strict=True) if band not in "Aa")
    if samples.white is None and highest <= 64:  # to which Pillow rounds 16383 in a PPM
        raise UserError(_too_dark(f"{highest * 256 + 255} of 65535 at most", samples.bits))


def _too_dark(reached: str, bits: int) -> str:
    return f"has {bits}-bit values up to {reached}, so it is not known which is white; {RESCALE}"


def _has_unused(image: Any, data: bytes) -> bool:
    """Whether each pixel has a fourth byte that is 0, and that a TGA or TIFF does not say to be alpha."""
    if image.mode != "RGBA" or image.format not in ("TGA", "TIFF"):
        return False
    stated = data[17] & 15 if image.format == "TGA" else 338 in image.tag_v2  # bits of alpha; ExtraSamples
    return not stated and image.getchannel("A").getextrema() == (0, 0)


def _opaque(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, BACKGROUND)
    opaque.paste(image, mask=image)
    return opaque
