"""The report of a finished stage: accuracies from the confusion matrix, as a table and as results.json. metrics.py
counts."""

import functools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lit_cifar
from lit_cifar import log
from lit_cifar.files import write_durably
from lit_cifar.results.metrics import NUM_BINS, Calibration, Mistakes, count_confusion
from lit_cifar.text import printable

try:
    import resource
except ImportError:  # Windows has no such thing
    resource = None  # type: ignore[assignment]


MOST_LISTED = 100  # classes up to which a table lists them all, and dashboards get a curve for each
NUM_WORST, NUM_BEST = 10, 5  # of more classes than that a table lists so many
NUM_PAIRS = 5  # of classes that a table names as confused most


@dataclass(frozen=True)
class Report:
    """Everything that is read from one confusion matrix, so that no two figures can disagree.

    Args:
        confusion: (K, K) integers, rows true and columns predicted; its sum is the number of images. A column more,
            where there is one, counts images whose logits are not finite: they predict no class. Dense or sparse.
        loss: mean cross-entropy.
        classes: names of the K classes.
        calibration: how confident the net was, and how often right.
        mistakes: its most confident mistakes.
    """

    confusion: Tensor
    loss: float
    classes: tuple[str, ...]
    calibration: Calibration
    mistakes: Mistakes

    @classmethod
    def of_nothing(cls, classes: tuple[str, ...]) -> "Report":
        """The report of a stage in which no image was looked at."""
        none, no_images = torch.zeros(NUM_BINS, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        mistakes = Mistakes(no_images.new_zeros((0, 3, 32, 32)).byte(), no_images, no_images, no_images.float())
        confusion = count_confusion(no_images, len(classes))
        return cls(confusion, math.nan, classes, Calibration(none, none, none.double()), mistakes)

    @functools.cached_property
    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and count of each cell of the matrix that is not 0, (n,) int64 each, by row and column.

        There are at most as many as images, however many classes there are: all figures are computed of these.
        """
        sparse = self.confusion.to_sparse().coalesce()
        rows, columns = sparse.indices()
        return rows, columns, sparse.values()

    def _per_class(self, chosen: Tensor) -> Tensor:
        """Sums (K,) int64 of each class's counts in some of the cells (n,) bool."""
        rows, _, counts = self.cells
        return torch.zeros(len(self.classes), dtype=torch.int64).index_add_(0, rows[chosen], counts[chosen].long())

    @functools.cached_property
    def totals(self) -> Tensor:
        """Images of each class, (K,) int64."""
        return self._per_class(self.cells[1] >= 0)

    @functools.cached_property
    def rights(self) -> Tensor:
        """Those of them that were classified right, (K,) int64."""
        return self._per_class(self.cells[0] == self.cells[1])

    @property
    def num_images(self) -> int:
        return int(self.totals.sum())

    @property
    def num_correct(self) -> int:
        return int(self.rights.sum())

    @property
    def num_not_finite(self) -> int:
        """Images whose logits are not finite; they count as wrong."""
        return int(self._per_class(self.cells[1] == len(self.classes)).sum())

    @property
    def accuracy(self) -> float:
        """Share of images classified right, 0 to 1."""
        return self.num_correct / max(1, self.num_images)

    @property
    def per_class_accuracy(self) -> dict[str, float]:
        """Share of each class's images classified right, 0 to 1; 0 for a class without images."""
        return dict(zip(self.classes, (self.rights / self.totals.clamp(min=1).double()).tolist(), strict=True))

    def scalars(self) -> dict[str, float]:
        """Values by name for dashboards: loss, accuracy, calibration_error and, of up to MOST_LISTED classes,
        accuracy/<class>."""
        own = {"loss": self.loss, "accuracy": self.accuracy, "calibration_error": self.calibration.error}
        if len(self.classes) > MOST_LISTED:  # each would be a curve, and a metric to reduce over ranks
            return own
        return {**own, **{f"accuracy/{printable(name)}": value for name, value in self.per_class_accuracy.items()}}

    def worst_cells(self, num_cells: int) -> list[tuple[int, int, int, float]]:
        """Label, predicted class, number of images and their share of the label's, of the largest shares that are
        wrong."""
        rows, columns, counts = (cell.numpy() for cell in self.cells)
        shares = counts / self.totals.numpy()[rows]
        wrong = ((rows != columns) & (columns < len(self.classes))).nonzero()[0]
        order = wrong[np.lexsort((-counts[wrong], -shares[wrong]))][:num_cells]
        return [(int(rows[i]), int(columns[i]), int(counts[i]), float(shares[i])) for i in order]

    def table(self) -> str:
        """Lines for people: overall accuracy in per cent, an aligned table of classes, the pairs confused most.

        Of more than MOST_LISTED classes it has the worst and the best.
        """
        if not self.num_images:
            return "No test image was looked at (--trainer.limit_test_batches): there is no accuracy and no loss"
        listed, told = list(range(len(self.classes))), ""
        if len(listed) > MOST_LISTED:
            shares = (self.rights / self.totals.clamp(min=1).double()).tolist()
            ranked = sorted((label for label in listed if self.totals[label]), key=shares.__getitem__)
            listed = ranked[:NUM_WORST] + ranked[NUM_WORST:][-NUM_BEST:]
            told = f"The worst and the best of {len(self.classes):,} classes; per_class_accuracy in the results has all"
        names = {label: printable(self.classes[label]) for label in listed}
        width = max(len("class"), *map(len, names.values()))
        counts = max(len("correct"), len(f"{self.num_images:,}"))
        lines = [
            f"Accuracy on the {self.num_images:,} test images: {100 * self.accuracy:.2f} %",
            "",
            f"{'class':<{width}}  accuracy  {'correct':>{counts}}  {'images':>{counts}}",
        ]
        for label, name in names.items():
            right, total = int(self.rights[label]), int(self.totals[label])
            share = f"{100 * right / max(1, total):6.2f} %"
            lines.append(f"{name:<{width}}  {share}  {right:{counts},}  {total:{counts},}")
        lines += ["", told] if told else []
        if worst := self.worst_cells(NUM_PAIRS):
            pairs = [
                f"{printable(self.classes[label])} → {printable(self.classes[prediction])} {100 * share:.0f} %"
                for label, prediction, _, share in worst
            ]
            lines += ["", f"Most confused: {', '.join(pairs)}"]
        return "\n".join(lines)

    def warnings(self, num_all: int | None = None) -> list[str]:
        """What somebody should know who reads the figures: lines about some images that were not looked at, or whose
        logits are not finite.

        Args:
            num_all: number of images of the set, where all were meant to be looked at.
        """
        found = []
        if num_all is not None and 0 < self.num_images < num_all:
            found.append(
                f"{self.num_images:,} of {num_all:,} test images were looked at (--trainer.limit_test_batches): all "
                "figures are of these, and a class without any has accuracy 0"
            )
        if self.num_not_finite:
            found.append(
                f"the logits of {self.num_not_finite:,} of {self.num_images:,} images are not finite: they count as "
                "wrong, and there is no loss; choose a smaller --lr, or --precision 32-true if it was less"
            )
        elif self.num_images and not math.isfinite(self.loss):
            found.append("the loss is infinite: the net gives a true class a logit of minus infinity")
        return found

    def results(self) -> dict[str, Any]:
        """The part of results.json that the confusion matrix decides; null for what was not measured.

        `confusion_matrix` is K rows of K counts. A sparse one is null, and `confusion_counts` has a triple for each
        cell that is not 0: true class, predicted class, count.
        """
        num_classes = len(self.classes)
        dense = not self.confusion.is_sparse
        matrix: dict[str, Any] = {"confusion_matrix": self.confusion[:, :num_classes].tolist() if dense else None}
        if not dense:
            cells = torch.stack(self.cells, dim=1)
            matrix["confusion_counts"] = cells[cells[:, 1] < num_classes].tolist()
        return {
            "num_test": self.num_images,
            "accuracy": self.accuracy if self.num_images else None,
            "per_class_accuracy": self.per_class_accuracy if self.num_images else None,
            **matrix,
            "num_not_finite": self.num_not_finite,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "calibration_error": self.calibration.error if self.num_images > self.num_not_finite else None,
        }


def print_report(report: Report, without_tta: Report | None = None, num_all: int | None = None) -> None:
    """Prints the accuracies for people, on standard output; with test-time augmentation, also the accuracy without.

    What limits them is a warning on standard error; `num_all` is the number of images of the test set.
    """
    print(f"\n{report.table()}")
    if without_tta is not None:
        print(f"\nWithout test-time augmentation: {100 * without_tta.accuracy:.2f} %")
    for warning in report.warnings(num_all):
        log.warn(warning)


def write_results(path: Path, results: dict[str, Any], write: Callable[[Path, bytes], None] = write_durably) -> None:
    """Writes results.json, with what it was measured with, whole or not at all; `write` writes the bytes."""
    results = {**results, "versions": versions(), "commit": commit()}
    matrices = {key: results[key] for key in ("confusion_matrix", "confusion_counts") if results.get(key)}
    text = json.dumps({**results, **dict.fromkeys(matrices)}, indent=2)
    for key, matrix in matrices.items():  # a row is a line: with a line for each count, 1,000 classes took 10 MB
        rows = ",\n    ".join(map(json.dumps, matrix))
        text = text.replace(f'\n  "{key}": null', f'\n  "{key}": [\n    {rows}\n  ]', 1)
    write(path, f"{text}\n".encode())


def peak_memory() -> dict[str, int | None]:
    """Peak memory so far in bytes: resident, of this process or the largest it started; on the GPU, if any."""
    peak: int | None = None
    if resource is not None:
        own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        with suppress(OSError, IndexError):  # Linux, where ru_maxrss is no less than the peak of what started us
            own = int(Path("/proc/self/status").read_bytes().split(b"VmHWM:")[1].split()[0])
        peak = max(own, children) * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
    # is_available() alone takes 0.3 ms where there is no GPU, and this is asked at each logged step
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() and torch.cuda.is_available() else None
    return {"resident": peak, "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    import lightning
    import torchmetrics
    import torchvision

    packages = {m.__name__: str(m.__version__) for m in (lit_cifar, torch, torchvision, lightning, torchmetrics)}
    return {"python": platform.python_version(), **packages}


def commit() -> str | None:
    """The commit of the checkout this package runs from, '-dirty' behind it when it was changed; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, encoding="utf-8", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
