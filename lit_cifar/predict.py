"""`python -m lit_cifar.predict`: tells what images show. How an image becomes pixels is sources', the net is module's."""

import contextlib
import csv
import glob
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from lit_cifar import cli
from lit_cifar.classifier import load
from lit_cifar.errors import UserError
from lit_cifar.module import Classifier
from lit_cifar.sources import IMAGE_BYTES, IMAGE_SUFFIXES, decode_image, in_order, printable

SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff")  # taken from folders
STDIN = "-"
READER_GONE = 128 + 13  # the exit code of a process that SIGPIPE ended, such as `yes` in `yes | head`


class Pixels(NamedTuple):
    """An image as the net takes it: 3072 bytes (3, 32, 32) RGB 0..255; or what is wrong with it."""

    path: str
    data: bytes
    error: str = ""


class Prediction(NamedTuple):
    """The likeliest classes of an image with their probabilities, best first; or what is wrong with it."""

    path: str
    classes: list[tuple[str, float]]
    error: str = ""


def main(args: list[str]) -> None:
    """Prints a line for each image; `args` is the command line without the program's name."""
    parser = cli.NetParser("python -m lit_cifar.predict", "Prints the likeliest classes of images, one image a line.")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="an image file of any size and format that Pillow reads, a folder (with all folders in it), a pattern "
        "such as 'photos/**/*.jpg', or - for standard input: an image, or paths one a line",
    )
    parser.add_argument("--top", type=int, metavar="N", default=3, help="classes to print of each image (default: 3)")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print a JSON object for each image")
    formats.add_argument("--csv", action="store_true", help="print CSV with a header")
    parser.add_argument("--batch_size", type=int, metavar="N", default=256, help="images at a time (default: 256)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu", "auto"), default="auto", help="(default: auto)")
    options = parser.parse_intermixed_args(args)
    for flag in ("top", "batch_size"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)} must be at least 1")
    device = _device(options.accelerator)
    net, classes = load(options.ckpt_path, options.tta, options.trust)
    cli.suit_cpu(options.batch_size * sum(parameter.numel() for parameter in net.parameters()))
    warnings.filterwarnings("ignore", module="PIL")  # about oddities of files; what matters is told on the image's line
    images = list(_find_images(options.paths))
    if not images:
        raise UserError(f"no images in {', '.join(options.paths)}; looked for {', '.join(SUFFIXES)}")

    write = _Writer("json" if options.json else "csv" if options.csv else "text", min(options.top, len(classes)))
    num_broken = 0
    try:
        for prediction in _predict(net.to(device), classes, images, options.batch_size, write):
            num_broken += bool(prediction.error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(READER_GONE)
    if num_broken:
        raise UserError(f"{num_broken} of {len(images)} images could not be read")
