"""`python -m lit_cifar.export`: writes a checkpoint's net for other programs, once the file agrees with the net.
model/classifier.py has the net."""

from lit_cifar import process

if __name__ == "__main__":
    process.begin()  # before the imports, which take seconds

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import lit_cifar
from lit_cifar.cli import machine
from lit_cifar.cli.parser import NetParser
from lit_cifar.data.datamodule import Dataset
from lit_cifar.data.official import DEFAULT_DATA_DIR
from lit_cifar.data.source import find_source
from lit_cifar.errors import UserError
from lit_cifar.files import check_output, write_output, writing
from lit_cifar.model.classifier import Classifier, load
from lit_cifar.run.read import checksum, parts_of, read_checkpoint
from lit_cifar.text import in_command

LARGEST_DIFFERENCE = 1e-4  # of an exported net's logits
NUM_COMPARED = 256  # images at a time; does not divide a test set's size, so that batches of two sizes are tried
NO_RUN = {"dataset": "shapes", "data_dir": None}  # of a checkpoint from Python, which says nothing of its data
METADATA = "lit_cifar.json"  # the name of the settings within a file of torch.export
WAY_OUT = "name another file with --output"
Predict = Callable[[Tensor], Tensor]  # images (B, 3, 32, 32) uint8 to logits (B, K)


@dataclass(frozen=True)
class Format:
    """How a net becomes the bytes of a file, and how these become a net again.

    Args:
        packages: those it needs from the extra `export`.
        dump: makes the bytes from a net and the settings to store with it.
        read: makes a function that predicts from the bytes, and from the net where they are its weights alone.
        judge: the program that predicts, for the report.
        largest_difference: how far its logits may be from the net's.
    """

    packages: tuple[str, ...]
    dump: Callable[[Classifier, dict[str, Any]], bytes]
    read: Callable[[bytes, Classifier], Predict]
    judge: str
    largest_difference: float


@in_command()
def main(args: list[str]) -> None:
    """Exports, compares and writes; `args` is the command line without the program's name."""
    options = _parser().read(args)
    output = Path(options.output)
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: choose a name that ends in {', '.join(FORMATS)}")
    if options.half and output.suffix != ".safetensors":
        raise UserError(f"--half {output}: only .safetensors holds float16; leave --half out, or choose that format")
    check_output(output, WAY_OUT)
    form = FORMATS[output.suffix]
    try:
        for package in form.packages:
            importlib.import_module(package)
    except ImportError:
        raise UserError(f"{output.suffix} needs {package}: pip install 'lit_cifar[export]'") from None

    net, classes = load(options.ckpt_path, options.tta, options.trust)
    state = read_checkpoint(Path(options.ckpt_path))
    images, name = _test_images(state.config.get("data") or NO_RUN, options.data_dir, options.dataset)
    settings: dict[str, Any] = {
        "classes": list(classes),
        "tta": net.tta,
        "config": state.config,
        "lit_cifar": lit_cifar.__version__,
    }
    settings["config"]["model"]["tta"] = net.tta
    settings |= {"recipe": state.recipe, "num_steps": state.step, "half": options.half}
    if options.half:
        rounded = _rounded(net)
        num_same, difference = compare(rounded, net, images)
        print(
            f"Rounded to float16: on {len(images):,} test images of {name} the net and the rounded one predict "
            f"the same class for {num_same:,}, their logits differ by at most {difference:.1e}"
        )
        net = rounded
    with _quiet():
        try:
            data = form.dump(net, settings)
        except Exception as error:  # exporters raise anything on what they cannot trace
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{type(net.net).__name__} cannot be exported as {output.suffix} ({type(error).__name__}: {reason}); "
                ".safetensors takes the weights of any net"
            ) from error
        num_same, difference = compare(form.read(data, net), net, images)
    compared = (
        f"on {len(images):,} test images of {name}: {form.judge} and the net predict the same class for {num_same:,}, "
        f"their logits differ by at most {difference:.1e}"
    )
    if num_same < len(images) or not difference <= form.largest_difference:
        raise UserError(f"{output} is not written; it was compared {compared}")
    with writing(output, WAY_OUT):
        write_output(output, data)
    print(f"Compared {compared}")
    print(f"Exported {output}: images uint8 (batch, 3, 32, 32) to logits (batch, {len(classes)}), {len(data):,} bytes")


def compare(predict: Predict, net: Classifier, images: Tensor) -> tuple[int, float]:
    """How many images `predict` and `net` put into the same class, and the largest difference between their logits.

    Args:
        predict: the file's program.
        net: the net it was made of.
        images: (N, 3, 32, 32) uint8 0..255.

    Returns:
        The difference is infinite if a logit is not a number.
    """
    num_same, difference = 0, 0.0
    with torch.inference_mode():
        for batch in images.split(NUM_COMPARED):
            ours, theirs = net(batch), predict(batch)
            num_same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            difference = max(difference, float((ours - theirs).abs().max().nan_to_num(torch.inf)))
    return num_same, difference


def _parser() -> NetParser:
    parser = NetParser(
        "python -m lit_cifar.export",
        "Exports a checkpoint's net, with scaling, normalisation and test-time augmentation inside, and compares the "
        "file with the net on the test images before it is written.",
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="net.onnx, net.pt2 or net.safetensors")
    parser.add_argument("--half", action="store_true", help="round weights to float16: half the .safetensors file")
    parser.add_argument("--data_dir", metavar="PATH", help="images to compare on (default: the run's)")
    parser.add_argument("--dataset", choices=get_args(Dataset), help="images to compare on (default: the run's)")
    return parser


def _test_images(run: dict[str, Any], data_dir: str | None, dataset: str | None) -> tuple[Tensor, str]:
    """The test images (N, 3, 32, 32) to compare on, and where they come from; nothing is downloaded.

    Raises:
        UserError: there are none at --data_dir.
    """
    run = {key: value for key, value in run.items() if isinstance(value, str)}  # a stranger's may be anything
    of_run: str = run.get("dataset", "")
    of_run = of_run if of_run in get_args(Dataset) else "cifar10"
    dataset = dataset or ("cifar10" if data_dir and of_run == "shapes" else of_run)
    folder = data_dir or run.get("data_dir") or DEFAULT_DATA_DIR
    source = find_source(folder, dataset)
    name = "the embedded shapes" if dataset == "shapes" else folder
    if not source.is_here:
        if data_dir:
            raise UserError(f"--data_dir {data_dir} holds no images to compare on")
        source = find_source(folder, "shapes")
        name = f"the embedded shapes (the run's, in {folder}, are not on this machine)"
    source.prepare()
    return source.read(train=False).images, name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what exporters log about their own work."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _any_batch() -> dict[str, Any]:
    """Arguments of exporters: images to trace with, two, for from one batches would be of one only; and what varies."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    return {"args": (images,), "dynamic_shapes": {"images": {0: torch.export.Dim("batch")}}}


def _dump_onnx(net: Classifier, settings: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        net, **_any_batch(), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert program is not None
    proto = program.model_proto
    for key, value in settings.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def _read_onnx(data: bytes, net: Classifier) -> Predict:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # or it warns about GPUs that it does not find
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _dump_program(net: Classifier, settings: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    program = torch.export.export(net, **_any_batch())
    torch.export.save(program, file, extra_files={METADATA: json.dumps(settings)})
    return file.getvalue()


def _read_program(data: bytes, net: Classifier) -> Predict:
    return torch.export.load(io.BytesIO(data)).module()


def _rounded(net: Classifier) -> Classifier:
    """A copy whose net, not its preprocessing, was float16 in between.

    Raises:
        UserError: float16 cannot hold its weights.
    """
    rounded = copy.deepcopy(net)
    rounded.net.half()
    if not all(weight.isfinite().all() for weight in rounded.net.state_dict().values()):
        raise UserError("--half: weights of this net are too large for float16, or not finite; leave --half out")
    rounded.net.float()
    return rounded


def _dump_weights(net: Classifier, settings: dict[str, Any]) -> bytes:
    import safetensors.torch

    weights = {name: weight.contiguous().clone() for name, weight in net.state_dict().items()}  # it refuses views
    for name, weight in weights.items():
        is_rounded = settings["half"] and name.startswith("net.") and weight.is_floating_point()
        if is_rounded and torch.equal(weight.half().to(weight.dtype), weight):  # not of norms that a net keeps precise
            weights[name] = weight.half()
    return with_metadata(safetensors.torch.save(weights), {key: json.dumps(value) for key, value in settings.items()})


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A .safetensors file with other metadata, the same bytes each time: safetensors 0.8 has them in any order."""
    header, body = parts_of(data)
    header["__metadata__"] = metadata
    header["__metadata__"] = {**metadata, "crc32": checksum(header, body)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the weights are aligned
    return len(text).to_bytes(8, "little") + text + body


def _read_weights(data: bytes, net: Classifier) -> Predict:
    import safetensors.torch

    other = copy.deepcopy(net)
    for weight in other.state_dict().values():
        weight.zero_()  # so that a weight missing from the file shows
    other.load_state_dict(safetensors.torch.load(data))
    return other


FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), _dump_onnx, _read_onnx, "ONNX Runtime", LARGEST_DIFFERENCE),
    ".pt2": Format((), _dump_program, _read_program, "torch.export", LARGEST_DIFFERENCE),
    ".safetensors": Format((), _dump_weights, _read_weights, "torch", 0.0),
}


if __name__ == "__main__":
    machine.run(main)
