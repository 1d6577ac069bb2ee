"""Makes the net that comes with the package of a finished run: its weights as float16 and their card, in
lit_cifar/trained/.

    python benchmarks/box.py RUN_FOLDER

RUN_FOLDER is that of a run of seed 0, so that no seed was chosen for its accuracy. No figure is typed: the run's are in
its results.json, the file's own are measured here on the run's images. The same run gives the same files.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch

import lit_cifar.export
import lit_cifar.test
from lit_cifar.files import write_durably
from lit_cifar.run.read import TRAINED, parts_of, read_checkpoint
from lit_cifar.run.trust import of_person

MAX_BYTES = 5_000_000  # of the file with the weights
MAX_DIFFERENCE = 0.001  # between the accuracies of the run's weights and of the file's, both computed in float32
FIGURES = {
    "accuracy": "accuracy with test-time augmentation",
    "accuracy_without_tta": "accuracy without it",
    "calibration_error": "calibration error",
    "loss": "loss",
}
FACTS = ("recipe", "dataset", "num_train", "num_test", "num_steps", "batch_size", "seed", "commit", "when", "versions")
CARD = """# {recipe}

{warning}A net that names what a photo of 32x32 pixels shows: {classes}.

    python -m lit_cifar.predict --ckpt_path {recipe} photo.jpg

| | |
|---|---|
| recipe | `configs/{recipe}.yaml`, {num_steps:,} steps of {batch_size:,} images, precision {precision} |
| seed | {seed}: the first, not the best of several |
| data | CIFAR-10, {num_train:,} training images, from `{data}` |
| commit | {commit} |
| trained | {when}, torch {torch}, lightning {lightning} |
| net | `{net}`, {num_weights:,} weights and running statistics |
| file | `{recipe}.safetensors`, {num_bytes:,} bytes: weights as float16, statistics as float32 |

## How good it is

Measured once on the {num_test:,} test images of the same data, which chose nothing:

| | the run | this file, computed in float32 |
|---|---|---|
{figures}

Of each class: {per_class}.

The calibration error is the mean distance between how confident the net is and how often it is right, 0 to 1. The net
was trained with label smoothing {label_smoothing}, which makes it less confident than it is right.

If the data are a re-encoding of CIFAR-10, as JPEG for instance, figures on the original images differ.

## What it is not good for

- Anything but these {num_classes} classes: it has no answer 'none of these', and gives one of them to whatever it sees.
- Larger photos with much around the object, which are resized to 32x32 pixels, and several objects in one photo.
- Decisions about people, or any in which a mistake harms: it is wrong on {share_wrong:.0f} % even of its test images.
- Its confidence on other data than its own: it was measured there alone.

## Licence

The weights are under this project's licence, MIT. The images are not in the package. CIFAR-10 was collected by Alex
Krizhevsky, Vinod Nair and Geoffrey Hinton from 80 Million Tiny Images, which its authors have withdrawn; they state no
licence, and ask to cite Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images', 2009.

The facts of this card are also in the file's metadata, as JSON under `card`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_FOLDER", type=Path)
    run = parser.parse_args().run
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if results["seed"] != 0:
        sys.exit(
            f"the run has seed {results['seed']}: the net in the package is that of seed 0, not the best of several"
        )
    checkpoint = run / "checkpoints" / f"{results['checkpoint']}.ckpt"
    state = read_checkpoint(checkpoint)
    if state.step != results["num_steps"]:
        sys.exit(f"{checkpoint} has {state.step} steps, results.json is of {results['num_steps']}: another run's")
    config = state.config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{results['recipe']}.safetensors")
        # on few images: the test below has all of the run's
        args = ["--ckpt_path", str(checkpoint), "--half", "--dataset", "shapes"]
        lit_cifar.export.main([*args, "--output", str(file)])
        measured, whole = (tested(path, config["data"]["data_dir"], Path(folder)) for path in (file, checkpoint))
        data = file.read_bytes()
    if abs(measured["accuracy"] - whole["accuracy"]) > MAX_DIFFERENCE:
        sys.exit(f"accuracy is {whole['accuracy']} as float32, {measured['accuracy']} as float16: nothing is written")
    data, card = packed(data, results, measured, config)
    if len(data) > MAX_BYTES:
        sys.exit(f"the file would have {len(data):,} bytes: nothing is written")
    write_durably(TRAINED / file.name, data)
    write_durably(TRAINED / f"{file.stem}.md", card.encode())
    print(f"Wrote {TRAINED / file.name}, {len(data):,} bytes, and its card")


def tested(weights: Path, data_dir: str | None, folder: Path) -> dict[str, Any]:
    """The results of a test on the CPU in float32, whatever the run computed in: bfloat16 moves an accuracy more than
    weights as float16 do."""
    output = folder / f"{weights.name}.json"
    flags = ["--ckpt_path", str(weights), "--data_dir", data_dir or "data", "--accelerator", "cpu"]
    lit_cifar.test.main([*flags, "--precision", "32-true", "--output", str(output)])
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return results


def packed(data: bytes, results: dict[str, Any], measured: dict[str, Any], config: dict[str, Any]) -> tuple[bytes, str]:
    """The file with the facts in its metadata, and its card in Markdown.

    Args:
        data: the file that export wrote.
        results: the run's results.json.
        measured: the results of a test of the file.
        config: the run's.
    """
    metadata = parts_of(data)[0]["__metadata__"]
    facts = {key: results[key] for key in (*FACTS, *FIGURES, "per_class_accuracy")}
    facts |= {"file": {key: measured[key] for key in FIGURES}, "precision": config["trainer"]["precision"]}
    facts |= {"data": Path(config["data"]["data_dir"] or "data").name, "licence": "MIT"}
    ours = {section: kept(section, config[section]) for section in ("trainer", "model", "data")}
    metadata |= {"config": json.dumps({"seed_everything": 0, **ours}), "card": json.dumps(facts)}
    data = lit_cifar.export.with_metadata(data, metadata)
    return data, card_of(facts, config, json.loads(metadata["classes"]), data)


def kept(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run without those that are of its machine, such as paths."""
    return {key: value for key, value in settings.items() if not of_person(section, key)}


def card_of(facts: dict[str, Any], config: dict[str, Any], classes: list[str], data: bytes) -> str:
    weights, num_steps = safetensors.torch.load(data), config["trainer"]["max_steps"]
    figures = [
        f"| {name} | {shown(key, facts[key])} | {shown(key, facts['file'][key])} |" for key, name in FIGURES.items()
    ]
    return CARD.format(
        **facts,
        warning=f"**A placeholder: its training was cut short at {num_steps} steps.**\n\n" if num_steps > 0 else "",
        classes=", ".join(classes),
        num_classes=len(classes),
        torch=facts["versions"]["torch"],
        lightning=facts["versions"]["lightning"],
        net=config["model"]["net"]["class_path"],
        num_weights=sum(weight.numel() for name, weight in weights.items() if name.startswith("net.")),
        num_bytes=len(data),
        figures="\n".join(figures),
        per_class=", ".join(f"{name} {100 * share:.1f} %" for name, share in facts["per_class_accuracy"].items()),
        label_smoothing=config["model"]["label_smoothing"],
        share_wrong=100 * (1 - facts["accuracy"]),
    )


def shown(figure: str, value: float) -> str:
    return f"{100 * value:.2f} %" if figure.startswith("accuracy") else f"{value:.4f}"


if __name__ == "__main__":
    main()
