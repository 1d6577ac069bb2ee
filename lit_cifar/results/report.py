"""The report of a finished stage: accuracies from the confusion matrix, as a table and as results.json. metrics.py
counts."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lit_cifar
from lit_cifar.files import write_durably
from lit_cifar.results.metrics import Calibration, Mistakes

try:
    import resource
except ImportError:  # Windows has no such thing
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Report:
    """Everything that is read from one confusion matrix, so that no two figures can disagree.

    Args:
        confusion: (K, K) integers, rows true and columns predicted; its sum is the number of images.
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

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def num_correct(self) -> int:
        return int(self.confusion.diag().sum())

    @property
    def accuracy(self) -> float:
        """Share of images classified right, 0 to 1."""
        return self.num_correct / max(1, self.num_images)

    @property
    def per_class_accuracy(self) -> dict[str, float]:
        """Share of each class's images classified right, 0 to 1; 0 for a class without images."""
        right, total = self.confusion.diag().double(), self.confusion.sum(1)
        return dict(zip(self.classes, (right / total.clamp(min=1)).tolist(), strict=True))

    def scalars(self) -> dict[str, float]:
        """Values by name for TensorBoard: loss, accuracy, calibration_error and accuracy/<class>."""
        per_class = {f"accuracy/{name}": value for name, value in self.per_class_accuracy.items()}
        own = {"loss": self.loss, "accuracy": self.accuracy, "calibration_error": self.calibration.error}
        return {**own, **per_class}

    def confused_pairs(self, num_pairs: int = 5) -> list[tuple[str, str, float]]:
        """The pairs (true class, predicted class, share of the true class's images, 0 to 1) confused most often."""
        shares = self.confusion.double() / self.confusion.sum(1, keepdim=True).clamp(min=1)
        shares.fill_diagonal_(0)
        most = shares.flatten().topk(min(num_pairs, shares.numel()))
        return [
            (self.classes[position // len(self.classes)], self.classes[position % len(self.classes)], share)
            for share, position in zip(most.values.tolist(), most.indices.tolist(), strict=True)
            if share
        ]

    def table(self) -> str:
        """Lines for people: overall accuracy in per cent, an aligned table of the classes', the pairs confused most."""
        width = max(len("class"), *map(len, self.classes))
        counts = max(len("correct"), len(f"{self.num_images:,}"))
        lines = [
            f"Accuracy on the {self.num_images:,} test images: {100 * self.accuracy:.2f} %",
            "",
            f"{'class':<{width}}  accuracy  {'correct':>{counts}}  {'images':>{counts}}",
        ]
        totals = self.confusion.sum(1).tolist()
        rights = self.confusion.diag().tolist()
        for (name, accuracy), right, total in zip(self.per_class_accuracy.items(), rights, totals, strict=True):
            lines.append(f"{name:<{width}}  {100 * accuracy:6.2f} %  {right:{counts},}  {total:{counts},}")
        if pairs := self.confused_pairs():
            said = ", ".join(f"{true} → {predicted} {100 * share:.0f} %" for true, predicted, share in pairs)
            lines += ["", f"Most confused: {said}"]
        return "\n".join(lines)

    def results(self) -> dict[str, Any]:
        """The part of results.json that the confusion matrix decides."""
        return {
            "num_test": self.num_images,
            "accuracy": self.accuracy,
            "per_class_accuracy": self.per_class_accuracy,
            "confusion_matrix": self.confusion.tolist(),
            "loss": self.loss,
            "calibration_error": self.calibration.error,
        }


def print_report(report: Report, without_tta: Report | None = None) -> None:
    """Prints the accuracies for people, on standard output; with test-time augmentation, also the accuracy without."""
    print(f"\n{report.table()}")
    if without_tta is not None:
        print(f"\nWithout test-time augmentation: {100 * without_tta.accuracy:.2f} %")


def write_results(path: Path, results: dict[str, Any], write: Callable[[Path, bytes], None] = write_durably) -> None:
    """Writes results.json, with what it was measured with, whole or not at all; `write` writes the bytes."""
    results = {**results, "versions": versions(), "commit": commit()}
    write(path, (json.dumps(results, indent=2) + "\n").encode())


def peak_memory() -> dict[str, int | None]:
    """Peak memory so far in bytes: resident, of this process or the largest it started; on the GPU, if any."""
    peak: int | None = None
    if resource is not None:
        own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        with suppress(OSError, IndexError):  # Linux, where ru_maxrss is no less than the peak of what started us
            own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        peak = max(own, children) * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
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
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
