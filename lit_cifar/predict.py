"""`python -m lit_cifar.predict`: classifies images, and prints a line for each. data/images.py decodes them;
model/classifier.py has the net."""

from lit_cifar import process

if __name__ == "__main__":
    process.begin()  # before the imports, which take seconds

import csv
import functools
import glob
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from lit_cifar import log
from lit_cifar.cli import machine
from lit_cifar.cli.parser import NetParser
from lit_cifar.data.images import IMAGE_SUFFIXES, decode_image, in_order, is_image, read_image
from lit_cifar.data.members import MAX_MEMBER_BYTES
from lit_cifar.errors import UserError
from lit_cifar.files import local_path
from lit_cifar.model.classifier import Classifier, load
from lit_cifar.run.read import TRAINED
from lit_cifar.text import in_command, printable

SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff")  # found in folders
STDIN = "-"
DEFAULT_NET = "speedrun94"
NOT_FINITE = "the net's logits for it are not finite"


class Pixels(NamedTuple):
    """An image as nets take it, or the reason why it cannot be read."""

    path: str
    data: bytes  # (3, 32, 32) RGB 0..255
    error: str = ""


class Prediction(NamedTuple):
    """The likeliest classes of an image, or the reason why there are none."""

    path: str
    classes: list[tuple[str, float]]  # with their probabilities 0 to 1, best first
    error: str = ""


@in_command()
def main(args: list[str]) -> None:
    """Prints a line for each image; `args` is the command line without the program's name."""
    options = _parser().read(args)
    for flag in ("top", "batch_size"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)} must be at least 1")
    for path in options.paths:
        local_path(path, "PATH")  # refuses URLs; as a Path, ./a.png would be printed as a.png
    paths = [os.path.expanduser(path) for path in options.paths]
    device = _device(options.accelerator)
    path = options.ckpt_path or TRAINED / f"{DEFAULT_NET}.safetensors"  # which no file here stands in for
    net, classes = load(path, options.tta, options.trust)
    if not options.ckpt_path:
        log.tell(f"without --ckpt_path, the net is {DEFAULT_NET}, which knows only {', '.join(classes)}")
    net.to(device)
    warnings.filterwarnings("ignore", module="PIL")  # about oddities of files; the image's line has what matters
    images = [image for path in paths for image in _find(path)]
    if not images:
        raise UserError(f"no images in {', '.join(paths)}; folders were searched for {', '.join(SUFFIXES)}")
    machine.suit_cpu(options.batch_size * sum(parameter.numel() for parameter in net.parameters()))

    top = min(options.top, len(classes))
    lines = _json_lines if options.json else functools.partial(_csv_lines, top=top) if options.csv else _text_lines
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be bytes that are not text

    errors: list[str] = []

    def finish(batch: list[Pixels]) -> None:
        predictions = _predict(net, classes, batch, top)
        sys.stdout.write(lines(predictions))
        sys.stdout.flush()
        errors.extend(prediction.error for prediction in predictions if prediction.error)

    if options.csv:
        columns = [f"{column}_{place}" for place in range(1, top + 1) for column in ("class", "probability")]
        print("path", *columns, "error", sep=",")
    _in_background(finish, _batches(images, options.batch_size, frozenset(paths)))
    if errors:
        done = "classified" if NOT_FINITE in errors else "read"
        raise UserError(f"{len(errors)} of {len(images)} images could not be {done}")


def _parser() -> NetParser:
    description = "Prints the likeliest classes of images, one image per line."
    parser = NetParser("python -m lit_cifar.predict", description, DEFAULT_NET)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="an image of any size, a folder with images at any depth, a quoted pattern such as 'photos/**/*.jpg', a "
        "pipe such as <(curl URL), or - for standard input: an image, or paths, one per line",
    )
    parser.add_argument("--top", type=int, metavar="N", default=3, help="classes printed for each image (default: 3)")
    parser.add_argument("--batch_size", type=int, metavar="N", default=256, help="images at a time (default: 256)")
    accelerators = ("cpu", "gpu", "cuda", "mps", "auto")  # as of fit
    parser.add_argument("--accelerator", choices=accelerators, default="auto", help="default: auto")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")
    return parser


def _device(accelerator: str) -> torch.device:
    for name, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if available and accelerator in ("gpu", "auto", name):
            return torch.device(name, 0)
    if accelerator not in ("cpu", "auto"):
        kind = "" if accelerator == "gpu" else " of that kind"
        raise UserError(f"--accelerator {accelerator}: torch finds no GPU{kind}; use --accelerator cpu")
    return torch.device("cpu")


def _find(path: str) -> Iterator[tuple[str, bytes | None]]:
    """The images that a PATH means, each with its bytes if they came on standard input."""
    if path != STDIN:
        yield from ((file, None) for file in _files(path))
        return
    data = sys.stdin.buffer.read(MAX_MEMBER_BYTES + 1)  # one more than decode_image takes: it may be endless
    if len(data) > MAX_MEMBER_BYTES or b"\0" in data or is_image(data):
        yield STDIN, data
    else:
        text = data.decode(sys.getfilesystemencoding(), "surrogateescape")  # os.fsdecode raises on Windows
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        yield from ((file, None) for line in lines if line for file in _files(line))


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return _walk(path)
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    matches = sorted(_matches(path)) or [path]  # without a match, the line reports a missing file
    files = (file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match]))
    return list(dict.fromkeys(files))  # ** matches a folder and what is in it


def _matches(pattern: str) -> list[str]:
    """What a pattern names; ** leads into folders and, unlike glob's, not into links, which may lead back and forth."""
    found = re.search(rf"(?:^|(?<=[/{re.escape(os.sep)}]))\*\*(?:[/{re.escape(os.sep)}]+|$)", pattern)
    if not found:
        return glob.glob(pattern)
    head, tail = pattern[: found.start()], pattern[found.end() :]
    matches = []
    for folder in glob.glob(head) if head else ["."]:
        for here, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name[0] != "."]
            if not head:
                here = here.removeprefix(".").removeprefix(os.sep)
            if tail:
                matches += _matches(os.path.join(glob.escape(here), tail))
            else:
                matches += [os.path.join(here, name) for name in files if name[0] != "."]
    return matches


def _walk(folder: str) -> list[str]:
    """The images in a folder, at any depth, sorted; with the folders that cannot be read, whose lines will say so."""
    found: list[str] = []

    def keep(error: OSError) -> None:
        found.append(error.filename)

    for here, folders, files in os.walk(folder, onerror=keep):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(here, name) for name in files if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found)


def _batches(
    images: Iterable[tuple[str, bytes | None]], batch_size: int, named: Collection[str] = ()
) -> Iterator[list[Pixels]]:
    batch: list[Pixels] = []
    for _, pixels in in_order(_read(images, named), _decode):
        batch.append(pixels)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(
    images: Iterable[tuple[str, bytes | None]], named: Collection[str]
) -> Iterator[tuple[tuple[str, str], bytes]]:
    """The images' files; of pipes those that are `named`, for a folder may hold any number that nobody writes to."""
    for path, data in images:
        error = ""
        if data is None:
            try:
                data = read_image(path, may_be_pipe=path in named)
            except UserError as failed:
                data, error = b"", str(failed)
            except (OSError, ValueError) as failed:  # ValueError: a zero byte in a path
                data, error = b"", getattr(failed, "strerror", None) or str(failed)
        yield (path, error), data


def _decode(key: tuple[str, str], data: bytes) -> Pixels:
    path, error = key
    if error:
        return Pixels(path, b"", error)
    try:
        return Pixels(path, decode_image(data)[0])
    except UserError as broken:
        return Pixels(path, b"", str(broken))


def _in_background(finish: Callable[[list[Pixels]], None], batches: Iterable[list[Pixels]]) -> None:
    """Calls `finish` with each batch in a thread, while this one decodes the next."""
    with ThreadPoolExecutor(1) as thread:
        running: Future[None] | None = None
        for batch in batches:
            following = thread.submit(finish, batch)
            if running:
                running.result()
            running = following
        if running:
            running.result()


@torch.inference_mode()
def _predict(net: Classifier, classes: tuple[str, ...], batch: list[Pixels], top: int) -> list[Prediction]:
    whole = bytearray().join(image.data for image in batch)
    rows: Iterator[tuple[list[float], list[int]]] = iter(())
    if whole:
        images = torch.frombuffer(whole, dtype=torch.uint8).view(-1, 3, 32, 32)
        likeliest = net(images.to(net.mean.device)).float().softmax(1).topk(top)  # NaN comes first
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    predictions = []
    for path, _, error in batch:
        named: list[tuple[str, float]] = []
        if not error:
            probabilities, indices = next(rows)
            named = [(classes[index], probability) for index, probability in zip(indices, probabilities, strict=True)]
            if math.isnan(probabilities[0]):
                named, error = [], NOT_FINITE
        predictions.append(Prediction(path, named, error))
    return predictions


def _text_lines(predictions: list[Prediction]) -> str:
    return "".join(
        "  ".join((printable(path), *(f"{printable(name)} {100 * share:.1f} %" for name, share in classes)))
        + (f"  error: {error}\n" if error else "\n")
        for path, classes, error in predictions
    )


def _json_lines(predictions: list[Prediction]) -> str:
    lines = []
    for path, classes, error in predictions:
        named = [{"class": name, "probability": round(probability, 6)} for name, probability in classes]
        lines.append(json.dumps({"path": path, "error": error} if error else {"path": path, "predictions": named}))
    return "".join(f"{line}\n" for line in lines)


def _csv_lines(predictions: list[Prediction], top: int) -> str:
    lines = io.StringIO()
    for path, classes, error in predictions:
        columns = [column for name, probability in classes for column in (printable(name), f"{probability:.6f}")] or [
            ""
        ] * 2 * top
        csv.writer(lines, lineterminator="\n").writerow([path, *columns, error])
    return lines.getvalue()


if __name__ == "__main__":
    machine.run(main)
