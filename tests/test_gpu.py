"""What changes, and what must not, on a GPU. Run by `make test-gpu`, in about two minutes.

test_cuda.py has what can be known of a GPU without one. LIT_CIFAR_TEST_DEVICE=cpu tries these tests out on the CPU,
where nothing is ever waited for.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, Run, results, scalars
from lightning.pytorch import Callback, LightningModule, Trainer

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.data.augment import Augment
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.shapes import draw_shapes
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.save import Checkpoints
from lit_cifar.training.loop import LeanEpochLoop

DEVICE = os.environ.get("LIT_CIFAR_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
    pytest.mark.filterwarnings("default"),  # drivers and compilers that nobody here has seen may warn of something
]
ON_IT = ["--dataset", "shapes", "--accelerator", "gpu" if DEVICE == "cuda" else "cpu"]
FEW = ["--batch_size", "100", "--max_epochs", "1", "--trainer.limit_train_batches", "9"]
FEW += ["--data.eval_batch_size", "100", "--trainer.limit_test_batches", "2"]
SMALL = ["--model.net.widths", "[16, 16, 16]"]  # of a speedrun's net
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
AUGMENT = Augment(crop=4, pad="reflect", flip="alternating", cutout=8, brightness=0.2, contrast=0.2)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Fills a list, in the end, with the line of each call in which the host waited for the GPU."""
    found: list[str] = []
    if DEVICE != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA" in str(one.message)]


def measured(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[list[str]]:
    """Where each call of a method waited."""
    calls: list[list[str]] = []
    inner = getattr(owner, name)

    def outer(self: Any, *args: Any) -> Any:
        with waits() as found:
            calls.append(found)
            return inner(self, *args)

    monkeypatch.setattr(owner, name, outer)
    return calls


def recipe(name: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / f"{name}.yaml"), *ON_IT]


def test_batches_on_the_gpu_are_those_on_the_cpu_to_the_bit() -> None:
    split = draw_shapes(train=False)
    ours, theirs = (
        DeviceLoader(split, TrainBatches(len(split.labels), 96, seed=1), torch.device(device), AUGMENT)
        for device in ("cpu", DEVICE)
    )
    for epoch in range(3):  # each made ahead in the one before
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        for (images, labels), (gpu_images, gpu_labels) in zip(ours, theirs, strict=True):
            assert gpu_images.device.type == DEVICE
            assert torch.equal(gpu_images.cpu(), images)
            assert torch.equal(gpu_labels.cpu(), labels)


def test_an_epoch_begins_and_ends_without_a_wait() -> None:
    split = draw_shapes(train=False)
    loader = DeviceLoader(split, TrainBatches(len(split.labels), 500, seed=1), torch.device(DEVICE), AUGMENT)
    assert len(list(loader)) == 4  # the first brings its indices, and those of the next
    loader.set_epoch(1)
    with waits() as found:
        batches = list(loader)
    assert len(batches) == 4
    assert not found


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "bf16-mixed") for name in RECIPES), ("resnet18", "32-true"), ("tutorial", "32-true")],
)
def test_a_recipe_keeps_the_gpu_busy(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = measured(monkeypatch, LeanEpochLoop, "advance")
    batches = measured(monkeypatch, LitClassifier, "_evaluate")
    saves = measured(monkeypatch, Checkpoints, "_save")
    lit_cifar.fit.main([*recipe(name), *FEW, "--precision", precision])
    assert len(steps) >= 9  # and perhaps one that finds the end
    for number, found in enumerate(steps[1:8], 2):  # the first brings the epoch's indices, the 9th logs
        assert not found, f"step {number}"
    assert batches
    assert not [found for found in batches if found]
    for (
        found
    ) in saves:  # one wait to learn that all is finite, one for all copies, and a few around them: none a tensor
        assert len(found) <= 5, found
    assert results("version_0")["num_test"] == 200


class Graphs(Callback):
    """Notes how many graphs are compiled after each step."""

    counts: list[int] = []  # noqa: RUF012

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.skipif(DEVICE == "cpu", reason="compiling takes minutes there")
def test_nothing_is_compiled_after_the_first_step() -> None:
    Graphs.counts.clear()
    net = [*SMALL, "--model.sides", "[24, 32]", "--model.tta", "mirror"]
    flags = ["--precision", "bf16-mixed", "--compile", "true", "--trainer.callbacks+=test_gpu.Graphs"]
    lit_cifar.fit.main([*recipe("speedrun94"), *FEW, *net, *flags])
    assert len(Graphs.counts) == 9
    assert Graphs.counts[0] > 0
    assert Graphs.counts[-1] == Graphs.counts[0]


def test_the_gpu_holds_no_float_copy_of_the_images() -> None:
    before = 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    lit_cifar.fit.main([*ON_IT, "--batch_size", "4", "--trainer.max_steps", "50", "--data.eval_batch_size", "100"])
    # 12,000 images are 37 MB as bytes, and cuBLAS takes up to 64 MB; as float32 they would be 147 MB more
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() - before < 147e6


def test_a_run_on_the_gpu_is_resumed_and_tested_there() -> None:
    lit_cifar.fit.main([*recipe("speedrun94"), *SMALL, *FEW])
    lit_cifar.fit.main(["--resume", "lightning_logs/version_0", "--max_epochs", "2"])
    found = results("version_0")
    assert found["num_steps"] == 18
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    lit_cifar.test.main(["--ckpt_path", checkpoint, *ON_IT[2:], "--output", "again.json"])
    assert json.loads(Path("again.json").read_text())["accuracy"] == pytest.approx(found["accuracy"], abs=0.002)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 2e-3), ("bf16-mixed", 0.02), ("16-mixed", 0.02)])
def test_a_gpu_trains_and_reports_as_the_cpu_does(precision: str, tolerance: float) -> None:
    if (DEVICE, precision) == ("cpu", "16-mixed"):
        pytest.skip("the CPU has no gradient scaler")
    args = ["--dataset", "shapes", "--batch_size", "32", "--lr", "0.05", "--trainer.max_steps", "20"]
    args += ["--trainer.log_every_n_steps", "1"]
    lit_cifar.fit.main([*args, "--accelerator", "cpu"])
    lit_cifar.fit.main([*args, *ON_IT, "--precision", precision])
    cpu, gpu = ([value for _, value in scalars(f"version_{version}")["train/loss"]] for version in (0, 1))
    assert gpu == pytest.approx(cpu, rel=tolerance)
    assert sum(map(sum, results("version_1")["confusion_matrix"])) == 2000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_with_the_statistics_of_the_whole_batch(run_command: Run) -> None:
    flags = [*recipe("resnet18"), "--batch_size", "100", "--trainer.max_steps", "20", "--lr", "0.01"]
    losses = []
    for version, devices in enumerate((1, 2)):
        path = os.pathsep.join(sys.path)
        done = run_command(
            "lit_cifar.fit", *flags, "--devices", devices, "--trainer.log_every_n_steps", 1, PYTHONPATH=path
        )
        assert done.returncode == 0, done.stderr
        losses.append([value for _, value in scalars(f"version_{version}")["train/loss"]])
    assert losses[1][:5] == pytest.approx(losses[0][:5], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
