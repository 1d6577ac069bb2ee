"""Many classes, one class, no image, logits that are not finite: runs end with their results, in bounded memory."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
import torch
from helpers import PYTHONPATH, ROOT, SHORT, results, scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import lit_cifar.bench
import lit_cifar.fit
import lit_cifar.runs
import lit_cifar.test
from lit_cifar.data import datamodule
from lit_cifar.data.split import Split, split_validation
from lit_cifar.errors import UserError
from lit_cifar.model.optim import lr_factor
from lit_cifar.nets import Net


@dataclass
class Synthetic:
    """A data source of random images, so many of each class."""

    classes: tuple[str, ...]
    num_train: int = 2
    num_test: int = 1
    is_here = True

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def prepare(self) -> None:
        pass

    def read(self, train: bool) -> Split:
        labels = torch.arange(len(self.classes)).repeat(self.num_train if train else self.num_test)
        images = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0))
        return Split(images.byte(), labels, self.classes)


def fit_on(source: Synthetic, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(datamodule, "find_source", lambda *_: source)
    lit_cifar.fit.main(["--accelerator", "cpu", "--batch_size", "100", "--max_epochs", "1", *flags])


def events_of(run: str) -> EventAccumulator:
    events = EventAccumulator(f"lightning_logs/{run}", size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


# ---- many classes ----


def test_1500_classes_train_test_and_report_in_bounded_pictures_tables_and_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tuple(f"class {label:04}" for label in range(1500))
    fit_on(Synthetic(names), monkeypatch, "--data.num_val", "1500")
    report = results("version_0")
    assert list(report["per_class_accuracy"]) == list(names)
    matrix = torch.tensor(report["confusion_matrix"])
    assert (matrix.shape, int(matrix.sum())) == ((1500, 1500), 1500)
    assert torch.equal(matrix.sum(1), torch.ones(1500, dtype=torch.int64))
    lines = Path("lightning_logs/version_0/results.json").read_text().splitlines()
    assert len(lines) < 3 * 1500 + 100, "a line for each class and row, not for each number"
    assert len(capsys.readouterr().out.splitlines()) < 40
    events = events_of("version_0")
    assert len(events.Tags()["scalars"]) < 30, "a curve of each class is of no use to anybody"
    for tag in ("val/confusion", "test/confusion"):
        picture = Image.open(BytesIO(events.Images(tag)[-1].encoded_image_string))
        assert max(picture.size) < 1600


FLAT = """
import sys
from pathlib import Path
import torch
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.split import Split, split_validation
from lit_cifar.results import pictures, report
from lit_cifar.results.metrics import Tally

def peak():
    return report.peak_memory()["resident"]

def evaluate(num_classes, path):
    tally = Tally(num_classes)
    for labels in torch.arange(num_classes).split(500):
        images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
        tally.update(torch.randn(len(labels), num_classes), images, labels)
    confusion, loss, *rest = tally.take()
    made = report.Report(confusion, loss, tuple(map(str, range(num_classes))), *rest)
    pictures.confusion_matrix(made)
    made.table(), made.scalars()
    report.write_results(path, made.results())

path = Path(sys.argv[1])
evaluate(100, path)
before = peak()
evaluate(1500, path)
few = peak() - before
evaluate(5000, path)
many = peak() - before
images = torch.ones(60_000, 3, 32, 32, dtype=torch.uint8)  # 184 MB
before = peak()
split_validation(Split(images, torch.arange(60_000) % 1000, tuple(map(str, range(1000)))), 3000, 0)
split = peak() - before
loader = DeviceLoader(Split(images, torch.zeros(60_000).long(), ("a",)), TrainBatches(60_000, 1), torch.device("cpu"))
before = peak()
next(iter(loader))
print(few, many, split, peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process's peak memory this way")
def test_memory_does_not_grow_with_the_square_of_the_classes_or_twice_with_the_images(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FLAT, str(tmp_path / "results.json")]
    output = subprocess.run(
        command, env={"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert output.returncode == 0, output.stderr
    few, many, split, epoch = map(int, output.stdout.split())
    assert few < 250e6, "of 1,500 classes"
    assert many < 400e6, "of 5,000 classes, of which a dense matrix has 200 MB"
    assert split < 100e6, "of 60,000 images, which have 184 MB"
    assert epoch < 15e6, "of the order of as many batches, 0.6 KB for each if it is an object"
    counts = json.loads((tmp_path / "results.json").read_text())["confusion_counts"]
    assert sum(count for _, _, count in counts) == 5000


@pytest.mark.parametrize("num_val", [1, 30, 33, 59])
def test_a_validation_split_keeps_each_image_with_its_label_and_their_order(num_val: int) -> None:
    labels = torch.arange(90) % 3
    images = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1).expand(90, 3, 32, 32).contiguous()
    parts = split_validation(Split(images, labels, ("a", "b", "c")), num_val, seed=3)
    numbers = [part.images[:, 0, 0, 0].long() for part in parts]
    assert all(torch.equal(part.labels, labels[number]) for part, number in zip(parts, numbers, strict=True))
    assert all(torch.equal(number, number.sort().values) for number in numbers)
    assert len(numbers[1]) == num_val
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(90))
    assert parts[0].images.untyped_storage().data_ptr() == parts[1].images.untyped_storage().data_ptr()


def test_a_class_without_images_is_no_obstacle_to_a_validation_split_that_takes_none_of_it() -> None:
    split = Split(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b", "none"))
    chosen = [split_validation(split, 2, seed) for seed in range(20) if _splits(split, seed)]
    assert chosen
    assert all(torch.bincount(val.labels, minlength=3).tolist() == [1, 1, 0] for _, val in chosen)


def _splits(split: Split, seed: int) -> bool:
    try:
        split_validation(split, 2, seed)
    except UserError:  # the seed takes one of the class that has none
        return False
    return True


# ---- what cannot be measured ----


class Overflows(Net):
    """Weights are finite, and the logits of every third image are not, in evaluation only."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        if self.training or len(logits) == 1:  # one image: as the number of logits is found
            return logits
        return torch.where(torch.arange(len(logits))[:, None] % 3 == 0, logits * math.inf, logits)


def test_logits_that_are_not_finite_are_counted_said_and_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.net", f"{__name__}.Overflows", "--data.num_val", "1000", "--trainer.limit_train_batches", "0.05"]
    flags += ["--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min", "--model.tta", "mirror"]
    lit_cifar.fit.main([*SHORT, *flags])
    report = results("version_0")
    not_finite = report["num_not_finite"]
    assert not_finite == 4 * 167
    assert report["num_test"] == 2000 == sum(map(sum, report["confusion_matrix"])) + not_finite
    assert report["loss"] is None
    assert 0 <= report["accuracy"] < 1
    assert math.isfinite(report["calibration_error"])
    assert report["checkpoint"] == "last", "a loss that is NaN chooses no state"
    said = capsys.readouterr()
    assert said.err.count("the logits of 668 of 2,000 images are not finite: they count as wrong") == 1
    assert said.err.count("validation at step 14: the logits of 334 of 1,000 images are not finite") == 1


@pytest.mark.parametrize("limit", ["0", "0.0"])
def test_a_run_that_tests_no_image_ends_with_results_that_say_so(
    limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lit_cifar.fit.main([*SHORT, "--trainer.limit_train_batches", "0.05", "--trainer.limit_test_batches", limit])
    report = results("version_0")
    assert (report["num_test"], report["num_test_left_out"]) == (0, 2000)
    for key in ("accuracy", "per_class_accuracy", "loss", "calibration_error"):
        assert report[key] is None, key
    assert torch.tensor(report["confusion_matrix"]).tolist() == [[0] * 10] * 10
    assert capsys.readouterr().out.count("No test image was looked at (--trainer.limit_test_batches)") == 1
    lit_cifar.runs.main(["--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["accuracy"], row["state"]) == (None, "done")


def test_the_test_command_limited_to_nothing_says_so_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    flags = ["--ckpt_path", checkpoint, "--accelerator", "cpu", "--output", "out.json"]
    lit_cifar.test.main([*flags, "--trainer.limit_test_batches", "0"])
    assert json.loads(Path("out.json").read_text())["accuracy"] is None
    assert "No test image was looked at" in capsys.readouterr().out
    lit_cifar.test.main([*flags, "--trainer.limit_test_batches", "0.25"])
    said = capsys.readouterr()
    assert "Accuracy on the 500 test images" in said.out
    assert "500 of 2,000 test images were looked at" in said.err


def test_bench_refuses_to_measure_an_accuracy_that_nothing_measures() -> None:
    with pytest.raises(UserError, match="limit_test_batches 0"):
        lit_cifar.bench.main(
            [str(ROOT / "configs" / "tutorial.yaml"), "--runs", "1", *SHORT, "--trainer.limit_test_batches", "0"]
        )


def test_bench_says_that_its_accuracies_are_of_some_test_images(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SHORT, "--trainer.max_steps", "1", "--trainer.limit_test_batches", "0.25"]
    lit_cifar.bench.main([str(ROOT / "configs" / "tutorial.yaml"), "--runs", "1", *few])
    assert "accuracies leave out 1,500 test images (--trainer.limit_test_batches)" in capsys.readouterr().out


def test_no_validation_of_images_kept_for_it_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.num_val", "1000", "--trainer.limit_val_batches", "0", "--trainer.limit_train_batches", "0.05"]
    lit_cifar.fit.main([*SHORT, *flags])
    assert capsys.readouterr().err.count("the 1,000 images of --data.num_val are neither trained on nor looked at") == 1
    assert results("version_0")["checkpoint"] == "last"


def test_one_class_trains_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    fit_on(Synthetic(("only",), 200, 20), monkeypatch, "--data.num_val", "50")
    report = results("version_0")
    assert (report["accuracy"], report["confusion_matrix"], report["loss"]) == (1.0, [[20]], 0.0)


NASTY = ("\x1b[2Jcat", "do|g", "``` <b>", "new\nline", "\u202egnp")


def test_no_escape_sequence_of_a_classs_name_reaches_a_terminal_or_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_on(Synthetic(NASTY, 40, 4), monkeypatch, "--data.num_val", "50")
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())
    assert list(results("version_0")["per_class_accuracy"]) == list(NASTY), "a file for programs has them as they are"
    events = events_of("version_0")
    tags = events.Tags()
    assert all(tag.isprintable() for tag in tags["scalars"])
    assert r"test/accuracy/'\x1b[2Jcat'" in tags["scalars"]
    (shown,) = events.Tensors("test/classes/text_summary")
    lines = shown.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.isprintable() and (line.startswith("    ") or not line) for line in lines), "one block of code"


# ---- what is logged at step N is step N's ----


class Norms(Callback):
    """Notes the norm of the gradients that each step is taken with, before they are clipped."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        NOTED.append(float(torch.nn.utils.get_total_norm(gradients)))


NOTED: list[float] = []


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.schedule", "linear", "--model.warmup", "0.3"],
        ["--model.schedule", "onecycle", "--model.warmup", "0.3", "--trainer.accumulate_grad_batches", "3"],
        ["--model.schedule", "constant"],
        ["--model.schedule", "cosine", "--trainer.callbacks", f"{__name__}.Norms"],
        ["--model.schedule", "cosine", "--trainer.callbacks", f"{__name__}.Norms", "--trainer.gradient_clip_val", "1"],
    ],
    ids=["warmup", "accumulated", "constant", "by Lightning's loop", "clipped"],
)
def test_rates_and_norms_logged_at_a_step_are_those_that_it_was_taken_with(flags: list[str]) -> None:
    NOTED.clear()
    lit_cifar.fit.main([*SHORT, "--trainer.max_steps", "12", "--trainer.log_every_n_steps", "2", *flags])
    schedule, warmup = flags[1], 0.3 if "--model.warmup" in flags else 0.0
    logged = scalars("version_0")
    assert [step for step, _ in logged["lr/net"]] == [2, 4, 6, 8, 10, 12]
    for step, rate in logged["lr/net"]:
        assert rate == pytest.approx(0.05 * lr_factor(step - 1, 12, schedule, warmup), rel=1e-6), step
    for step, norm in logged["train/gradient_norm"] if NOTED else ():
        clipped = min(1.0, NOTED[step - 1]) if "--trainer.gradient_clip_val" in flags else NOTED[step - 1]
        assert norm == pytest.approx(clipped, rel=1e-5), step


def test_a_run_resumed_at_a_logged_step_logs_the_rates_of_one_that_was_never_stopped() -> None:
    flags = ["--model.schedule", "linear", "--trainer.max_steps", "8", "--trainer.log_every_n_steps", "2"]
    lit_cifar.fit.main([*SHORT, *flags, "--checkpoint.every_n_train_steps", "4"])
    whole = scalars("version_0")["lr/net"]
    lit_cifar.fit.main(["--resume", "lightning_logs/version_0/checkpoints/last-1.ckpt", "--accelerator", "cpu"])
    assert whole == [(step, pytest.approx(0.05 * (1 - (step - 1) / 8))) for step in (2, 4, 6, 8)]
    assert scalars("version_0")["lr/net"] == whole
