"""A Mac without a Mac: the commands on a pretended mps, which refuses what Apple's mps refuses.

What pretend.py emulates, and what it does not, stands at its head.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT, error_of, results, weights
from PIL import Image
from pretend import Device, Pretended, pretended
from test_metrics import joined
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassConfusionMatrix

import lit_cifar
import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar.cli.machine import explained
from lit_cifar.model import module
from lit_cifar.results import metrics
from lit_cifar.results.metrics import Tally
from lit_cifar.run.read import _is_random_state
from lit_cifar.run.write import get_random_state, set_random_state
from lit_cifar.training.progress import Progress

SHORT = ["--dataset", "shapes", "--batch_size", "8", "--data.eval_batch_size", "10", "--max_epochs", "1"]
FEW = ["--trainer.limit_train_batches", "3", "--trainer.limit_test_batches", "2"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "speedrun95", "speedrun96")]
RECIPES = ["tutorial", "speedrun94", *SLOW]
CHECKPOINT = "lightning_logs/version_0/checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are whitened; torch's tracer goes past the pretence: TensorBoard's graph becomes a forward pass."""
    monkeypatch.setattr(module, "NUM_FIRST_IMAGES", 100)
    monkeypatch.setattr(SummaryWriter, "add_graph", lambda writer, net, images: net(images))


def recipe(name: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / f"{name}.yaml"), *SHORT, *FEW]


@pytest.mark.parametrize("before_2_9", [False, True], ids=["newest torch", "torch 2.8"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_tests_on_mps(name: str, before_2_9: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pretended("mps", before_2_9) as device:
        lit_cifar.fit.main(recipe(name))
        lit_cifar.test.main(["--ckpt_path", CHECKPOINT, *FEW[2:]])
    assert sum(device.launches.values()) > 100, "the device did the work"
    assert not device.without_mps
    output = capsys.readouterr()
    assert "rank 0 of 1 on mps:0" in output.out
    assert "no graph" not in output.out + output.err
    tested = json.loads(Path("lightning_logs/version_0/test-last.json").read_text())
    for key in ("num_test", "confusion_matrix", "loss", "calibration_error"):
        assert results("version_0")[key] == tested[key]
    assert tested["num_test"] == 20


class Dropping(nn.Sequential):
    """Draws from the device's random state in each step."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, num_classes))


def test_a_resumed_run_draws_on_from_the_devices_random_state() -> None:
    flags = [*SHORT, "--model.net", "test_mac.Dropping", "--trust", "true", *FEW[2:]]
    with pretended("mps", before_2_9=True) as device:
        lit_cifar.fit.main([*flags, "--trainer.max_steps", "6"])
        lit_cifar.fit.main([*flags, "--trainer.max_steps", "3"])
        assert device.offset, "dropout draws on the device"
        lit_cifar.fit.main(["--resume", "lightning_logs/version_1", "--trust", "true", "--trainer.max_steps", "6"])
    once, resumed = weights("version_0"), weights("version_1")
    assert all(torch.equal(weight, resumed[name]) for name, weight in once.items())


def test_a_run_moves_between_devices() -> None:
    """From CUDA to mps and on to a CPU: the random state of a device that is not there does no harm."""
    flags = [*SHORT, "--model.net", "test_mac.Dropping", "--trust", "true", *FEW[2:]]
    with pretended("cuda"):
        lit_cifar.fit.main([*flags, "--trainer.max_steps", "2"])
        assert "cuda" in get_random_state()
    resume = ["--resume", "auto", "--trust", "true", "--trainer.max_steps"]
    with pretended("mps") as device:
        lit_cifar.fit.main([*resume, "3"])
        assert device.launches
        assert "mps" in get_random_state()
    lit_cifar.fit.main([*resume, "4", "--accelerator", "cpu"])
    assert results("version_0")["num_steps"] == 4


def test_a_random_state_of_another_torch_is_passed_over_and_a_spoilt_one_refused() -> None:
    with pretended("mps") as device:
        state = get_random_state()
        torch.mps.manual_seed(7)
        set_random_state({**state, "mps": torch.zeros(36, dtype=torch.uint8)})  # torch 2.8's has no offset
        assert device.seed == 7
        assert _is_random_state(state)
        for spoilt in ("text", torch.zeros(44), torch.zeros(2, 22, dtype=torch.uint8)):
            assert not _is_random_state({**state, "mps": spoilt})


class Inline:
    """A thread pool without threads, in which the pretence would not hold."""

    def __init__(self, *given: Any) -> None:
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Any:
        function(*args)
        return self

    def result(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_predict_chooses_the_device_and_export_works_beside_it(
    kind: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lit_cifar.predict, "ThreadPoolExecutor", Inline)
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    Image.new("RGB", (40, 30), (200, 30, 60)).save("red.png")
    lit_cifar.predict.main(["--ckpt_path", checkpoint, "red.png", "--accelerator", "cpu"])
    expected = capsys.readouterr().out
    with pretended(kind) as device:
        for accelerator in ([], ["--accelerator", "gpu"], ["--accelerator", kind]):
            device.launches.clear()
            lit_cifar.predict.main(["--ckpt_path", checkpoint, "red.png", *accelerator])
            assert sum(device.launches.values()) > 50, device.launches
            assert capsys.readouterr().out == expected
        device.launches.clear()
        lit_cifar.predict.main(["--ckpt_path", checkpoint, "red.png", "--accelerator", "cpu"])
        lit_cifar.export.main(["--ckpt_path", checkpoint, "--output", "net.safetensors"])
        assert not device.launches
        other = {"mps": "cuda", "cuda": "mps"}[kind]
        assert f"--accelerator {other}: torch finds no GPU of that kind" in error_of(
            lit_cifar.predict.main, ["--ckpt_path", checkpoint, "red.png", "--accelerator", other]
        )
    assert not device.without_mps
    assert Path("net.safetensors").is_file()


def test_what_load_gives_works_on_mps(trained: Path) -> None:
    net, classes = lit_cifar.load(trained / "checkpoints" / "last.ckpt")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = net(images)
        with pretended("mps") as device:
            logits = net.to("mps:0")(images.to("mps:0"))
            assert isinstance(logits, Pretended)
            assert torch.equal(logits.cpu(), expected)
            assert classes[logits.argmax(1)] == classes[expected.argmax(1)]
    assert not device.without_mps


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--devices 2", "--devices 2"),
        ("--devices 2 --accelerator mps --strategy ddp", "--devices 2"),
        ("--num_nodes 2 --accelerator gpu", "--num_nodes 2"),
        ("--strategy ddp", "MPS"),
        ("--precision 64-true", "float64"),
        ("--accelerator cuda", "CUDAAccelerator"),
    ],
)
def test_what_a_mac_cannot_do_is_one_line(flags: str, what: str) -> None:
    with pretended("mps"):
        assert what in error_of(explained, lit_cifar.fit.main, [*SHORT, *FEW, *flags.split()])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "16-mixed"])
def test_a_precision_trains_on_mps(precision: str) -> None:
    """Without autocast, which is not emulated; gradient scaling is."""
    with pretended("mps", before_2_9=True) as device:
        lit_cifar.fit.main([*SHORT, *FEW, "--precision", precision])
    assert not device.without_mps
    assert results("version_0")["num_test"] == 20


@pytest.mark.parametrize(("num_workers", "accelerator"), [(0, "gpu"), (2, "mps")])
def test_a_transform_of_ones_own_works_beside_mps(
    num_workers: int, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []
    loader = torch.utils.data.DataLoader.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        pinned.append(kwargs.get("pin_memory", False))
        loader(self, *args, **kwargs)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noted)
    flags = ["--data.transform", "[torchvision.transforms.v2.RandomHorizontalFlip]", "--data.num_workers"]
    with pretended("mps") as device:
        lit_cifar.fit.main([*SHORT, *FEW, *flags, str(num_workers), "--accelerator", accelerator])
    assert device.launches
    assert pinned == [False], "pinned memory is CUDA's"


# ---- counts and sums ----


def rank_of(rank: int, num_ranks: int, logits: Tensor, labels: Tensor, images: Tensor, device: str) -> Tally:
    tally = Tally(logits.shape[1]).to(device)
    for batch in zip(logits.split(5000)[rank::num_ranks], labels.split(5000)[rank::num_ranks], strict=True):
        tally.update(batch[0].to(device), images[: len(batch[0])], batch[1].to(device))
    return tally


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("spread", [3.0, 0.0], ids=["trained", "untrained"])
def test_sums_over_a_million_images_are_those_of_float64(spread: float, num_ranks: int) -> None:
    """Also where all losses are the same, so that errors of rounding add up."""
    num_images, num_classes = 1_300_000, 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.3, 0.1, -0.2]) + spread * torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    images = torch.zeros(5000, 3, 32, 32, dtype=torch.uint8)
    with pretended("mps") as device:
        on_device = images.to("mps:0")
        ranks = [rank_of(rank, num_ranks, logits, labels, on_device, "mps:0") for rank in range(num_ranks)]
        confusion, loss, calibration, _ = joined(ranks).take()
    assert not device.without_mps
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert loss == pytest.approx(float(losses.double().mean()), rel=1e-7)
    confidences = logits.softmax(1).amax(1)
    assert float(calibration.confidence.sum()) == pytest.approx(float(confidences.double().sum()), rel=1e-7)
    assert torch.equal(confusion, MulticlassConfusionMatrix(num_classes)(logits, labels))
    assert int(calibration.num_images.sum()) == num_images
    assert int(calibration.num_correct.sum()) == int((logits.argmax(1) == labels).sum())


def test_the_running_loss_is_summed_in_float64() -> None:
    progress, losses = Progress(), torch.full((2000,), 2.3025851)
    strategy = SimpleNamespace(reduce=lambda total, reduce_op: total)
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=1, accumulate_grad_batches=1)
    with pretended("mps"):
        progress._losses = list(losses.to("mps:0"))
        progress._collect(trainer, batch_idx=1999)
    assert progress._logged == [pytest.approx(float(losses.double().sum()), rel=1e-12), 2000]


def test_more_classes_than_a_dense_matrix_is_for_are_counted_beside_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_DENSE", 2)
    logits, labels = torch.eye(3).repeat(4, 1), torch.arange(12) % 3
    with pretended("mps", before_2_9=True) as device:
        tally = Tally(3).to("mps:0")
        tally.update(logits.to("mps:0"), torch.zeros(12, 3, 32, 32, dtype=torch.uint8).to("mps:0"), labels.to("mps:0"))
        confusion = tally.take()[0]
    assert confusion.is_sparse
    assert torch.equal(confusion.to_dense(), 4 * torch.eye(3).long())
    assert not device.without_mps
    assert Device.current is device
