"""Trains, tests and reports on as many classes and images as ImageNet has, at 32x32, and measures the peak of memory.

    python tests/stress/scale.py [--num_images 1280000] [--num_classes 1000] [FLAGS of fit]
    python tests/stress/scale.py --rounds 5 [--num_images 1280000] [--num_classes 1000]

It ends with 1 when the whole process took more than 1.3 times the bytes of the images. With --rounds it measures what
whole epochs cost a step instead, order and draws included, against 50,000 images, in turn: of the loader alone, and
with the steps of the tutorial's net; it ends with 1 when the latter is more than 1.05 times. With --json the last
line is JSON, and it ends with 0. Needs 6 GB of memory and some minutes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lit_cifar.fit
from lit_cifar.data import datamodule
from lit_cifar.data.augment import Augment
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.split import Split
from lit_cifar.nets import Net

MOST = 1.3  # times the bytes of the images
FEW, MOST_COST = 50_000, 1.05  # images, and times the cost of a step of theirs
NUM_TEST, NUM_VAL = 50_000, 50_000  # ImageNet's validation set; and as many of the training images
FLAGS = ["--accelerator", "cpu", "--batch_size", "500", "--max_epochs", "1", "--model.schedule", "onecycle"]
FLAGS += ["--data.augment.crop", "4", "--data.augment.flip", "random", "--data.augment.cutout", "8"]


class Synthetic:
    """A data source of random images, equally many of each class."""

    is_here = True

    def __init__(self, num_images: int, num_classes: int) -> None:
        self.num_images, self.num_classes = num_images, num_classes

    def prepare(self) -> None:
        """Does nothing: they are made when they are read."""

    def read(self, train: bool) -> Split:
        num_images = self.num_images if train else NUM_TEST
        images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8)
        names = tuple(f"class {label}" for label in range(self.num_classes))
        return Split(images, torch.arange(num_images) % self.num_classes, names)


class Epochs:
    """Epochs over so many images in batches of 500, augmented; the net is the same for all."""

    def __init__(self, num_images: int, num_classes: int) -> None:
        split = Synthetic(num_images, num_classes).read(train=True)
        augment = Augment(crop=4, flip="random", cutout=8)
        self.loader = DeviceLoader(split, TrainBatches(num_images, 500), torch.device("cpu"), augment)
        self.net = Net(num_classes)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)

    def ms_a_step(self, epoch: int, trains: bool) -> float:
        self.loader.set_epoch(epoch)
        begun = time.perf_counter()
        for images, labels in self.loader:
            if trains:
                loss = F.cross_entropy(self.net(images.float() / 255 - 0.5), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        return 1000 * (time.perf_counter() - begun) / len(self.loader)


def compare_costs(num_images: int, num_classes: int, num_rounds: int) -> tuple[dict[str, Any], bool]:
    """Milliseconds a step with few images and with many, and whether the bar is met."""
    sizes = {size: Epochs(size, num_classes) for size in (FEW, num_images)}
    figures: dict[str, Any] = {}
    for trains, name in ((False, "loader alone"), (True, "with the net's steps")):
        costs: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(num_rounds + 1):
            for size, epochs in sizes.items():
                costs[size].append(epochs.ms_a_step(number, trains))
        few, many = (statistics.median(of_size[1:]) for of_size in costs.values())  # the first warms up
        print(
            f"{name}: {few:.3f} ms a step with {FEW:,} images, {many:.3f} with {num_images:,}: {many / few:.3f} times"
        )
        figures[name] = few, many
    return figures, many <= MOST_COST * few


def measure_memory(num_images: int, num_classes: int, flags: list[str]) -> tuple[dict[str, Any], bool]:
    """Bytes of the images, and of memory at its peak, and whether the bar is met."""
    source = Synthetic(num_images, num_classes)
    datamodule.find_source = lambda *_: source  # type: ignore[assignment, return-value]
    with tempfile.TemporaryDirectory() as folder:
        lit_cifar.fit.main([*FLAGS, "--data.num_val", str(NUM_VAL), "--trainer.default_root_dir", folder, *flags])
        run = Path(folder, "lightning_logs", "version_0")
        results = json.loads((run / "results.json").read_text())
        num_bytes = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert results["num_test"] == NUM_TEST
    images = (num_images + NUM_TEST) * 3 * 32 * 32
    peak = results["peak_memory"]["resident"]
    print(f"\nimages {images / 1e9:.2f} GB, peak of memory {peak / 1e9:.2f} GB: {peak / images:.3f} times")
    print(f"files of the run {num_bytes / 1e6:.1f} MB")
    return {"images": images, "peak": peak}, peak <= MOST * images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=1_280_000)
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=0, help="epochs of each size; 0: measure memory")
    parser.add_argument("--json", action="store_true")
    options, flags = parser.parse_known_args()
    if options.rounds:
        figures, is_met = compare_costs(options.num_images, options.num_classes, options.rounds)
    else:
        figures, is_met = measure_memory(options.num_images, options.num_classes, flags)
    if options.json:
        print(json.dumps(figures))
    return int(not is_met and not options.json)


if __name__ == "__main__":
    sys.exit(main())
