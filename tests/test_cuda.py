"""An H100 without one: the commands on a pretended cuda, which counts operators and notes what makes the host and the
device wait for each other. What pretend.py emulates, and what it does not, stands at its head; test_gpu.py has a GPU.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ROOT, results, weights
from pretend import Device, pretended
from torch.utils.tensorboard import SummaryWriter

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.data import loader
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.model import module
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.save import Checkpoints
from lit_cifar.training.loop import LeanEpochLoop

SHORT = ["--dataset", "shapes", "--batch_size", "8", "--data.eval_batch_size", "10", "--max_epochs", "1"]
FEW = ["--trainer.limit_train_batches", "9", "--trainer.limit_test_batches", "2"]
# launched in a steady step, with a margin of 5 % for torch's versions: 44, 209, 202, 202 and 275 on 2026-11-26
MOST_OPERATORS = {"tutorial": 46, "resnet18": 219, "speedrun94": 212, "speedrun95": 212, "speedrun96": 289}
FAST = ("tutorial", "speedrun94")
RECIPES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in MOST_OPERATORS]
Waits = Counter[tuple[str, str, str]]
Calls = list[tuple[int, Waits]]  # of a method: operators that it launched, and waits


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are whitened; torch's tracer goes past the pretence: TensorBoard's graph becomes a forward pass."""
    monkeypatch.setattr(module, "NUM_FIRST_IMAGES", 100)
    monkeypatch.setattr(SummaryWriter, "add_graph", lambda writer, net, images: net(images))


def measured(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Calls:
    """What each call of a method costs the device."""
    calls: Calls = []
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(self: Any, *args: Any) -> Any:
        device = Device.current
        before, device.waits, device.launches = (device.waits, device.launches), [], Counter()
        try:
            return inner(self, *args)
        finally:
            calls.append((device.launches.total(), Counter(device.waits)))
            device.waits, device.launches = before

    monkeypatch.setattr(owner, name, outer)
    return calls


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_the_device_busy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing images and test-time augmentation come with the recipes; tensors of two devices raise."""
    monkeypatch.setattr(loader, "CHUNK", 8)  # so that each batch is gathered and augmented by itself, as large ones are
    steps = measured(monkeypatch, LeanEpochLoop, "advance")
    batches = measured(monkeypatch, LitClassifier, "_evaluate")
    reports = measured(monkeypatch, LitClassifier, "_report")
    saves = measured(monkeypatch, Checkpoints, "_save")
    with pretended("cuda"):
        lit_cifar.fit.main(["--config", str(ROOT / "configs" / f"{name}.yaml"), *SHORT, *FEW])
    assert len(steps) == 9
    for number, (operators, waits) in enumerate(steps[1:8], 2):  # the first brings the epoch's indices, the 9th logs
        assert not waits, (number, waits)
        assert 10 < operators <= MOST_OPERATORS[name], (number, operators)
    assert len(batches) == 2
    assert not any(waits for _, waits in batches)
    assert reports
    for _, waits in reports:
        assert not [wait for wait in waits if wait[0].startswith("h2d")]
    ((_, waits),) = saves
    assert [count for (kind, *_), count in waits.items() if "async" not in kind] == [1], "learns that all is finite"
    assert any(kind == "d2h async" for kind, *_ in waits), "and waits once more, for all copies together"


def test_validation_resume_and_test_leave_nothing_on_another_device() -> None:
    flags = [*SHORT, *FEW, "--data.num_val", "80", "--trainer.val_check_interval", "4", "--model.tta", "mirror"]
    augment = ["--data.augment.crop", "4", "--data.augment.flip", "alternating", "--data.augment.cutout", "8"]
    colours = ["--data.augment.brightness", "0.2", "--data.augment.contrast", "0.2"]
    with pretended("cuda") as device:
        lit_cifar.fit.main([*flags, *augment, *colours])
        lit_cifar.fit.main([*flags, *augment, *colours, "--trainer.max_steps", "5"])
        lit_cifar.fit.main(["--resume", "lightning_logs/version_1", "--trainer.max_steps", "9"])
        lit_cifar.test.main(["--ckpt_path", "lightning_logs/version_1/checkpoints/last.ckpt", *FEW[2:]])
    assert device.launches
    once, resumed = weights("version_0"), weights("version_1")
    assert all(torch.equal(weight, resumed[name]) for name, weight in once.items())
    assert results("version_0")["confusion_matrix"] == results("version_1")["confusion_matrix"]


def test_pinned_memory_is_asked_for_where_a_transform_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(
        "lit_cifar.data.loader.Workers", lambda *args, pin_memory, **kwargs: given.append(pin_memory) or args
    )
    data = CIFAR10DataModule(dataset="shapes", transform=[torch.nn.Identity()])
    data.prepare_data()
    data.setup("fit")
    for kind in ("cuda", "mps", "cpu"):
        monkeypatch.setattr(data, "_device", lambda kind=kind: torch.device(kind))
        data.train_dataloader()
    assert given == [True, False, False]
