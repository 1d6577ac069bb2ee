"""`python -m lit_cifar.predict`: classifies images, and prints a line for each. data/images.py decodes them;
model/classifier.py has the net."""

import csv
import functools
import glob
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from lit_cifar.cli import machine
from lit_cifar.cli.parser import NetParser
from lit_cifar.data.images import IMAGE_SUFFIXES, decode_image, in_order
from lit_cifar.errors import UserError
from lit_cifar.files import local_path
from lit_cifar.model.classifier import Classifier, load
from lit_cifar.text import printable

SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff")  # found in folders
STDIN = "-"


class Pixels(NamedTuple):
    """An image as nets take it, or the reason why it cannot be read."""

    path: str
    data: bytes  # (3, 32, 32) RGB 0..255
    error: str = ""


class Prediction(NamedTuple):
    """The likeliest classes of an image, or the reason why it cannot be read."""

    path: str
    classes: list[tuple[str, float]]  # with their probabilities 0 to 1, best first
    error: str = ""


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
    net, classes = load(options.ckpt_path, options.tta, options.trust)
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

    def finish(batch: list[Pixels]) -> int:
        sys.stdout.write(lines(_predict(net, classes, batch, top)))
        sys.stdout.flush()
        return sum(bool(image.error) for image in batch)

    if options.csv:
        columns = [f"{column}_{place}" for place in range(1, top + 1) for column in ("class", "probability")]
        print("path", *columns, "error", sep=",")
    num_broken = _in_background(finish, _batches(images, options.batch_size))
    if num_broken:
        raise UserError(f"{num_broken} of {len(images)} images could not be read")


def _parser() -> NetParser:
    parser = NetParser("python -m lit_cifar.predict", "Prints the likeliest classes of images, one image per line.")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="an image of any size and format that Pillow reads, a folder with images at any depth, a quoted pattern "
        "such as 'photos/**/*.jpg', or - for standard input: an image, or paths, one per line",
    )
    parser.add_argument("--top", type=int, metavar="N", default=3, help="classes printed for each image (default: 3)")
    parser.add_argument("--batch_size", type=int, metavar="N", default=256, help="images at a time (default: 256)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu", "auto"), default="auto", help="default: auto")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")
    return parser


def _device(accelerator: str) -> torch.device:
    if accelerator != "cpu":
        for name, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if available:
                return torch.device(name)
    if accelerator == "gpu":
        raise UserError("--accelerator gpu: torch finds no GPU; use --accelerator cpu")
    return torch.device("cpu")


def _find(path: str) -> Iterator[tuple[str, bytes | None]]:
    """The images that a PATH means, each with its bytes if they came on standard input."""
    if path != STDIN:
        yield from ((file, None) for file in _files(path))
        return
    data = sys.stdin.buffer.read()
    if _is_image(data) or b"\0" in data:
        yield STDIN, data
    else:
        lines = (line.removesuffix("\r") for line in os.fsdecode(data).split("\n"))
        yield from ((file, None) for line in lines if line for file in _files(line))


def _is_image(data: bytes) -> bool:
    from PIL import Image

    try:
        Image.open(io.BytesIO(data)).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # as decode_image says, PIL raises anything
        return False
    return True


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return _walk(path)
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True)) or [path]  # without a match, the line reports a missing file
    files = (file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match]))
    return list(dict.fromkeys(files))  # ** matches a folder and what is in it


def _walk(folder: str) -> list[str]:
    """The images in a folder, at any depth, sorted; with the folders that cannot be read, whose lines will say so."""
    found: list[str] = []

    def keep(error: OSError) -> None:
        found.append(error.filename)

    for here, folders, files in os.walk(folder, onerror=keep):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(here, name) for name in files if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found)


def _batches(images: Iterable[tuple[str, bytes | None]], batch_size: int) -> Iterator[list[Pixels]]:
    batch: list[Pixels] = []
    for _, pixels in in_order(_read(images), _decode):
        batch.append(pixels)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(images: Iterable[tuple[str, bytes | None]]) -> Iterator[tuple[tuple[str, str], bytes]]:
    for path, data in images:
        error = ""
        if data is None:
            try:
                with open(path, "rb", buffering=0) as file:
                    data = file.readall()
            except OSError as failed:
                data, error = b"", failed.strerror or type(failed).__name__
        yield (path, error), data


def _decode(key: tuple[str, str], data: bytes) -> Pixels:
    path, error = key
    if error:
        return Pixels(path, b"", error)
    try:
        return Pixels(path, decode_image(data)[0])
    except UserError as broken:
        return Pixels(path, b"", str(broken))


def _in_background(finish: Callable[[list[Pixels]], int], batches: Iterable[list[Pixels]]) -> int:
    """The sum of what `finish` returns; it works in a thread while this one decodes the next batch."""
    total = 0
    with ThreadPoolExecutor(1) as thread:
        running: Future[int] | None = None
        for batch in batches:
            following = thread.submit(finish, batch)
            total += running.result() if running else 0
            running = following
        total += running.result() if running else 0
    return total


@torch.inference_mode()
def _predict(net: Classifier, classes: tuple[str, ...], batch: list[Pixels], top: int) -> list[Prediction]:
    whole = bytearray().join(image.data for image in batch)
    rows: Iterator[tuple[list[float], list[int]]] = iter(())
    if whole:
        images = torch.frombuffer(whole, dtype=torch.uint8).view(-1, 3, 32, 32)
        likeliest = net(images.to(net.mean.device)).float().softmax(1).topk(top)
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    predictions = []
    for path, _, error in batch:
        named: list[tuple[str, float]] = []
        if not error:
            probabilities, indices = next(rows)
            named = [(classes[index], probability) for index, probability in zip(indices, probabilities, strict=True)]
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
