"""Draws what TensorBoard shows: confusion matrix, mistakes, images, filters, reliability. Nothing is counted here, and
nothing is written to disk.

Each function gives an (H, W, 3) uint8 array. Pillow draws them: matplotlib's start alone, 0.5 s, would be 3 % of a
demo run. Colours are told apart by colour-blind readers too: one ramp from white to blue, and blue beside orange
(Okabe and Ito's palette).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_cifar.results.metrics import NUM_BINS, Calibration, Mistakes
from lit_cifar.results.report import Report
from lit_cifar.text import printable

Picture = npt.NDArray[np.uint8]

BLACK, GREY, LIGHT, WHITE = (0, 0, 0), (110, 110, 110), (225, 225, 225), (255, 255, 255)
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)
DARKEST = (8, 48, 107)  # of the ramp
FEW_CLASSES = 20  # up to here the confusion matrix has room for counts
MOST_CLASSES = 60  # up to here for a row of each; of more it shows NUM_GROUPS groups and the NUM_PAIRS worst pairs
NUM_GROUPS, NUM_PAIRS, PAIRS_WIDTH = 50, 24, 560
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
    """`text` in printable letters, cut with an ellipsis where it is wider than `width` pixels."""
    text = printable(text)
    if _width(text, size) <= width:
        return text
    while text and _width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text}…"


def confusion_matrix(report: Report) -> Picture:
    """Rows are true classes, columns predicted ones; colour is the share of the row, numbers are counts.

    More than MOST_CLASSES classes are drawn as NUM_GROUPS groups of neighbours, beside them the worst pairs, so that
    the picture stays as large however many classes there are.
    """
    num_classes = len(report.classes)
    few, many = num_classes <= FEW_CLASSES, num_classes > MOST_CLASSES
    num_rows = NUM_GROUPS if many else num_classes
    row_of = np.arange(num_classes) * num_rows // num_classes
    names = list(report.classes)
    if many:
        ends = np.flatnonzero(np.diff(row_of, prepend=-1, append=num_rows))  # where each group begins
        names = [f"{names[first]} … {names[last - 1]}" for first, last in itertools.pairwise(ends)]
    cell, size = (50, 19) if few else (12, 11)
    names = [_shortened(name, size, 170) for name in names]
    label = max(_width(name, size) for name in names) + 8
    left, top = MARGIN + label + 20, MARGIN + 52 + label
    side = cell * num_rows
    legend = "rows: true class, columns: predicted; colour: share of the row"
    if many:
        legend = f"{num_classes:,} classes in {num_rows} groups of neighbours; {legend}"
    width = max(left + side + many * PAIRS_WIDTH, MARGIN + _width(legend, 16)) + MARGIN
    image, draw = _canvas(width, top + side + MARGIN)
    title = f"Accuracy {100 * report.accuracy:.2f} % of {report.num_images:,} images"
    draw.text((MARGIN, MARGIN - 4), title, fill=BLACK, font=_font(20))
    draw.text((MARGIN, MARGIN + 20), legend, fill=GREY, font=_font(16))
    for row, name in enumerate(names):
        draw.text((left - 8, top + row * cell + cell // 2), name, fill=BLACK, font=_font(size), anchor="rm")
        _upwards(image, left + row * cell + cell // 2, top - 6, name, size)
    rows, columns, counts = (part[report.cells[1] < num_classes].numpy() for part in report.cells)
    matrix = np.zeros((num_rows, num_rows), np.int64)
    np.add.at(matrix, (row_of[rows], row_of[columns]), counts)
    _draw_cells(draw, matrix, (left, top), cell, few)
    if many:
        _draw_pairs(draw, report, left + side + 30, top)
    return np.asarray(image)


def _draw_cells(draw: ImageDraw.ImageDraw, matrix: Any, corner: tuple[int, int], cell: int, few: bool) -> None:
    """A matrix (R, R) of counts as cells of `cell` pixels, with their numbers where there are few."""
    (left, top), side = corner, cell * len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # the root, so that mistakes of a few per cent show
    ramp = np.array(WHITE) + np.sqrt(shares)[..., None] * (np.array(DARKEST) - np.array(WHITE))
    for row, column in np.ndindex(*matrix.shape):
        x, y = left + column * cell, top + row * cell
        colour = tuple(int(value) for value in ramp[row, column])
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=LIGHT if few else None)
        if few and (count := int(matrix[row, column])):
            ink = WHITE if shares[row, column] > 0.25 else BLACK
            text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
            draw.text((x + cell // 2, y + cell // 2), text, fill=ink, font=_font(18), anchor="mm")
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=GREY)


def _draw_pairs(draw: ImageDraw.ImageDraw, report: Report, left: int, top: int) -> None:
    """The pairs of classes confused most, each with its share and number of the true class's images."""
    size, step, bar = 14, 25, 120
    columns = [left, left + 155, left + 310, left + 320 + bar]
    for x, text in zip(columns, ("most confused: is", "said", "share of the class, images"), strict=False):
        draw.text((x, top - 26), text, fill=GREY, font=_font(size))
    for i, (label, prediction, count, share) in enumerate(report.worst_cells(NUM_PAIRS)):
        y = top + i * step
        names = [_shortened(report.classes[which], size, 145) for which in (label, prediction)]
        draw.rectangle((columns[2], y + 2, columns[2] + round(bar * share), y + 16), fill=BLUE)
        for x, text in zip(columns, (*names, "", f"{100 * share:.0f} %, {count:,}"), strict=True):
            draw.text((x, y), text, fill=BLACK, font=_font(size))


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
        (f"is {printable(classes[label])}", f"said {printable(classes[prediction])}", f"{100 * confidence:.1f} % sure")
        for label, prediction, confidence in zip(
            found.labels.tolist(), found.predictions.tolist(), found.confidences.tolist(), strict=True
        )
    ]
    tiles = [_tile(image, 128) for image in found.images]
    return _grid(tiles, captions, "The most confident mistakes" if tiles else "No mistakes", 4)


def training_images(images: Tensor, labels: Tensor, classes: Sequence[str]) -> Picture:
    """Images (N, 3, h, w) uint8 of a training batch as the net sees them, with their classes."""
    height, width = images.shape[2:]
    captions = [(printable(classes[label]),) for label in labels.tolist()]
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
