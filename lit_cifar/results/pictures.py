"""Draws what TensorBoard shows: confusion matrix, mistakes, images, filters, reliability. Nothing is counted here, and
nothing is written to disk.

Each function gives an (H, W, 3) uint8 array. Pillow draws them: matplotlib's start alone, 0.5 s, would be 3 % of a
demo run. Colours are told apart by colour-blind readers too: one ramp from white to blue, and blue beside orange
(Okabe and Ito's palette).
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_cifar.results.metrics import NUM_BINS, Calibration, Mistakes
from lit_cifar.results.report import Report

Picture = npt.NDArray[np.uint8]

BLACK, GREY, LIGHT, WHITE = (0, 0, 0), (110, 110, 110), (225, 225, 225), (255, 255, 255)
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
DARKEST = (8, 48, 107)  # of the ramp
FEW_CLASSES = 20  # up to here the confusion matrix has room for counts
MARGIN = 12


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), WHITE)
    return image, ImageDraw.Draw(image)


def _width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text)))


def _upwards(image: Image.Image, x: int, bottom: int, text: str, size: int) -> None:
    """Writes text that reads from the bottom up, centred on column x and ending below at row `bottom`."""
    label = Image.new("RGB", (_width(text, size) + 2, size + 4), WHITE)
    ImageDraw.Draw(label).text((0, 0), text, fill=BLACK, font=_font(size))
    turned = label.rotate(90, expand=True)
    image.paste(turned, (x - turned.width // 2, bottom - turned.height))


def _shortened(text: str, size: int, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if _width(text, size) <= width:
        return text
    while text and _width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text}…"


def confusion_matrix(report: Report) -> Picture:
    """Rows are true classes, columns predicted ones; colour is the share of the row, numbers are counts."""
    num_classes = len(report.classes)
    few = num_classes <= FEW_CLASSES
    cell, size = (50, 19) if few else (12, 11)
    names = [_shortened(name, size, 170) for name in report.classes]
    label = max(_width(name, size) for name in names) + 8
    left, top = MARGIN + label + 20, MARGIN + 52 + label
    side = cell * num_classes
    title = f"Accuracy {100 * report.accuracy:.2f} % of {report.num_images:,} images"
    legend = "rows: true class, columns: predicted; colour: share of the row"
    width = max(left + side, MARGIN + _width(legend, 16)) + MARGIN
    image, draw = _canvas(width, top + side + MARGIN)
    draw.text((MARGIN, MARGIN - 4), title, fill=BLACK, font=_font(20))
    draw.text((MARGIN, MARGIN + 20), legend, fill=GREY, font=_font(16))
    shares = report.confusion.double() / report.confusion.sum(1, keepdim=True).clamp(min=1)
    # the root, so that mistakes of a few per cent show
    ramp = np.array(WHITE) + shares.sqrt().numpy()[..., None] * (np.array(DARKEST) - np.array(WHITE))
    for row, name in enumerate(names):
        middle = top + row * cell + cell // 2
        draw.text((left - 8, middle), name, fill=BLACK, font=_font(size), anchor="rm")
        _upwards(image, left + row * cell + cell // 2, top - 6, name, size)
        for column in range(num_classes):
            x, y = left + column * cell, top + row * cell
            colour = tuple(int(value) for value in ramp[row, column])
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=LIGHT if few else None)
            count = int(report.confusion[row, column])
            if few and count:
                ink = WHITE if shares[row, column] > 0.25 else BLACK
                text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
                draw.text((x + cell // 2, y + cell // 2), text, fill=ink, font=_font(18), anchor="mm")
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=GREY)
    return np.asarray(image)


def _tile(image: Tensor, side: int) -> Image.Image:
    """One image (3, h, w) uint8 at side x side pixels, its own pixels visible."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((side, side), Image.Resampling.NEAREST)


def _grid(tiles: Sequence[Image.Image], captions: Sequence[Sequence[str]], title: str, num_columns: int) -> Picture:
    """Tiles in rows, below each its lines of text."""
    size, gap, head = 16, 10, 40
    num_lines = max((len(lines) for lines in captions), default=0)
    side = tiles[0].width if tiles else 96
    widest = max((_width(line, size) for lines in captions for line in lines), default=0)
    step = max(side, min(widest, 150)) + gap
    num_rows = max(1, -(-len(tiles) // num_columns))
    width = max(MARGIN + num_columns * step, 2 * MARGIN + _width(title, 17))
    row_height = side + num_lines * (size + 3) + gap
    image, draw = _canvas(width, head + num_rows * row_height + 4)
    draw.text((MARGIN, 8), title, fill=BLACK, font=_font(17))
    for position, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        x, y = MARGIN + position % num_columns * step, head + position // num_columns * row_height
        image.paste(tile, (x, y))
        for line, text in enumerate(lines):
            draw.text((x, y + side + 2 + line * (size + 3)), _shortened(text, size, step - 4), BLACK, font=_font(size))
    return np.asarray(image)


def mistakes(found: Mistakes, classes: Sequence[str]) -> Picture:
    """Images that the net got wrong, the most confident mistake first, each with its class, the predicted class and the
    net's confidence in that."""
    captions = [
        (f"is {classes[label]}", f"said {classes[prediction]}", f"{100 * confidence:.1f} % sure")
        for label, prediction, confidence in zip(
            found.labels.tolist(), found.predictions.tolist(), found.confidences.tolist(), strict=True
        )
    ]
    tiles = [_tile(image, 128) for image in found.images]
    return _grid(tiles, captions, "The most confident mistakes" if tiles else "No mistakes", 4)


def training_images(images: Tensor, labels: Tensor, classes: Sequence[str]) -> Picture:
    """Images (N, 3, h, w) uint8 of a training batch as the net sees them, with their classes."""
    height, width = images.shape[2:]
    captions = [(classes[label],) for label in labels.tolist()]
    title = f"Training images as the net sees them, {height}x{width}"
    return _grid([_tile(image, 64) for image in images], captions, title, 8)


def filters(weight: Tensor) -> Picture:
    """Filters (N, 3, h, w) of a first layer, any float dtype; grey is 0, each filter scaled by its largest value."""
    weight = weight.detach().float().cpu()
    scaled = weight / weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pixels = (127.5 * (scaled + 1)).round().to(torch.uint8)
    shape = "x".join(map(str, weight.shape[1:]))
    return _grid([_tile(image, 48) for image in pixels], [()] * len(pixels), f"First layer: filters of {shape}", 8)


def reliability(calibration: Calibration) -> Picture:
    """Accuracy of the images in each bin of confidence; a well-calibrated net stays on the diagonal."""
    side, left, top, bottom = 360, 70, 70, 62
    image, draw = _canvas(left + side + 40, top + side + bottom)
    title = f"Expected calibration error {100 * calibration.error:.2f} %"
    draw.text((MARGIN, MARGIN - 4), title, fill=BLACK, font=_font(18))
    x = MARGIN
    for colour, text in ((BLUE, "accuracy"), (ORANGE, "from accuracy to confidence")):
        draw.rectangle((x, MARGIN + 25, x + 12, MARGIN + 37), fill=colour)
        draw.text((x + 18, MARGIN + 22), text, fill=BLACK, font=_font(14))
        x += 40 + _width(text, 14)
    base = top + side
    for percent in range(0, 101, 20):
        offset = side * percent // 100
        draw.line((left, base - offset, left + side, base - offset), fill=LIGHT)
        draw.text((left - 8, base - offset), f"{percent} %", fill=BLACK, font=_font(14), anchor="rm")
        draw.text((left + offset, base + 8), f"{percent} %", fill=BLACK, font=_font(14), anchor="mt")
    bin_width = side / NUM_BINS
    for i, num_images in enumerate(calibration.num_images.tolist()):
        if not num_images:
            continue
        accuracy = float(calibration.num_correct[i]) / num_images
        confidence = float(calibration.confidence[i]) / num_images
        first, last = left + i * bin_width + 1, left + (i + 1) * bin_width - 1
        draw.rectangle((first, base - side * accuracy, last, base), fill=BLUE)
        ends = sorted((base - side * accuracy, base - side * confidence))
        draw.rectangle((first, ends[0], last, ends[1]), outline=ORANGE, width=3)
    draw.line((left, base, left + side, top), fill=GREY, width=2)
    draw.rectangle((left, top, left + side, base), outline=GREY)
    draw.text((left + side / 2, base + 32), "confidence of the prediction", fill=BLACK, font=_font(14), anchor="mt")
    _upwards(image, 14, top + side // 2 + 30, "accuracy", 14)
    return np.asarray(image)
