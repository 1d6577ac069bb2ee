"""What changes, and what must not, on a GPU. Run by `make test-gpu`."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import lit_cifar.fit
from lit_cifar.data.augment import Augment
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.shapes import draw_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


def test_batches_on_the_gpu_are_those_on_the_cpu_to_the_bit() -> None:
    split = draw_shapes(train=False)
    augment = Augment(crop=4, pad="reflect", flip="alternating", cutout=8, brightness=0.2, contrast=0.2)
    loaders = [
        DeviceLoader(split, TrainBatches(len(split.labels), 96, seed=1), torch.device(device), augment)
        for device in ("cpu", "cuda")
    ]
    for (images, labels), (gpu_images, gpu_labels) in zip(*loaders, strict=True):
        assert gpu_images.device.type == "cuda"
        assert torch.equal(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_trains_and_reports_as_the_cpu_does(precision: str) -> None:
    args = ["--dataset", "shapes", "--batch_size", "32", "--max_epochs", "2", "--lr", "0.05"]
    for accelerator in ("cpu", "gpu"):
        given = ["--precision", precision] if accelerator == "gpu" else []
        lit_cifar.fit.main([*args, "--accelerator", accelerator, *given])
    cpu, gpu = (json.loads(Path(f"lightning_logs/version_{n}/results.json").read_text()) for n in (0, 1))
    assert sum(map(sum, gpu["confusion_matrix"])) == 2000
    assert gpu["accuracy"] == pytest.approx(cpu["accuracy"], abs=0.03)  # two seeds differ by as much


def test_nothing_waits_for_the_gpu_between_logging_steps() -> None:
    torch.cuda.set_sync_debug_mode("default")
    args = ["--dataset", "shapes", "--batch_size", "100", "--max_epochs", "1", "--accelerator", "gpu"]
    args += ["--trainer.log_every_n_steps", "100", "--trainer.callbacks+=faults.NoWaiting"]
    try:
        lit_cifar.fit.main(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_trains_on_the_gpu(recipe: Path, precision: str) -> None:
    flags = ["--dataset", "shapes", "--batch_size", "100", "--accelerator", "gpu", "--precision", precision]
    lit_cifar.fit.main(["--config", str(recipe), *flags, "--trainer.fast_dev_run", "3"])


def test_the_gpu_holds_no_float_copy_of_the_images() -> None:
    torch.cuda.reset_peak_memory_stats()
    lit_cifar.fit.main(
        ["--dataset", "shapes", "--batch_size", "4", "--trainer.max_steps", "50", "--accelerator", "gpu"]
    )
    # 12,000 images are 37 MB as bytes and would be 147 MB as float32
    assert torch.cuda.max_memory_allocated() < 100e6
