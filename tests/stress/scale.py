"""Trains, tests and reports on as many classes and images as ImageNet has, at 32x32, and measures the peak of memory.

    python tests/stress/scale.py [--num_images 1280000] [--num_classes 1000] [FLAGS of fit]

It ends with 1 when the whole process took more than 1.3 times the bytes of the images. Needs 6 GB of memory and some
minutes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

import lit_cifar.fit
from lit_cifar.data import datamodule
from lit_cifar.data.split import Split

MOST = 1.3  # times the bytes of the images
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=1_280_000)
    parser.add_argument("--num_classes", type=int, default=1000)
    options, flags = parser.parse_known_args()
    source = Synthetic(options.num_images, options.num_classes)
    datamodule.find_source = lambda *_: source  # type: ignore[assignment, return-value]
    with tempfile.TemporaryDirectory() as folder:
        lit_cifar.fit.main([*FLAGS, "--data.num_val", str(NUM_VAL), "--trainer.default_root_dir", folder, *flags])
        run = Path(folder, "lightning_logs", "version_0")
        results = json.loads((run / "results.json").read_text())
        num_bytes = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert results["num_test"] == NUM_TEST
    images = (options.num_images + NUM_TEST) * 3 * 32 * 32
    peak = results["peak_memory"]["resident"]
    print(f"\nimages {images / 1e9:.2f} GB, peak of memory {peak / 1e9:.2f} GB: {peak / images:.3f} times")
    print(f"files of the run {num_bytes / 1e6:.1f} MB")
    return int(peak > MOST * images)


if __name__ == "__main__":
    sys.exit(main())
