"""The lean loop against Lightning's own: the same bits, the same progress, the same calls of callbacks.

As a program, `python -m test_loop FLAGS then FLAGS ...`, this file trains several times in the same processes.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, Run, assert_same_run, weights
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

import lit_cifar.fit
from lit_cifar.cli.command import CLI
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.log import CHILD_VARIABLE
from lit_cifar.model.module import LitClassifier
from lit_cifar.training import loop

FEW = [*SHAPES, "--batch_size", "50", "--max_epochs", "2", "--trainer.limit_train_batches", "30", "--lr", "0.05"]


class Own(PassThroughProfiler):
    """Leaves all steps to Lightning's own loop, and does nothing else."""


class Watching(Callback):
    """Notes what it is told around each step."""

    seen: list[Any] = []  # noqa: RUF012

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, trainer.global_step, [tuple(tensor.shape) for tensor in batch]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("watched", float(batch_idx), on_step=True, on_epoch=True)
        self.seen.append((batch_idx, trainer.global_step, outputs["loss"].item(), trainer.is_last_batch))


class Within(Callback):
    """Notes what it is told within each step, and logs there."""

    def __init__(self) -> None:
        self.seen = Watching.seen

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(("zero_grad", type(optimizer), self._gradients(pl_module)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        pl_module.log("before_backward", loss.detach())
        self.seen.append(("backward", loss.item(), self._gradients(pl_module)))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(("after_backward", trainer.global_step, self._gradients(pl_module)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(("step", type(optimizer), self._gradients(pl_module)))
        for weight in pl_module.parameters():
            assert weight.grad is not None
            weight.grad.mul_(0.5)

    def _gradients(self, module: LightningModule) -> list[str]:  # where nan equals nan
        return [str(weight.grad.sum().item()) for weight in module.parameters() if weight.grad is not None]


class Half(MixedPrecision):
    """float16 on the CPU, which Lightning offers for GPUs alone, with a scale so large that steps are left out."""

    def __new__(cls) -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3))


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Lightning's own step was taken")


HALF = ["--trainer.plugins+=test_loop.Half", "--trainer.limit_train_batches", "5", "--trainer.limit_test_batches", "1"]
LIGHTNINGS_STEP = "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run"


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.schedule", "onecycle", "--model.warmup", "0.3", "--data.augment.flip", "random"],
        ["--precision", "bf16-mixed"],
        ["--data.num_val", "1000", "--trainer.val_check_interval", "10"],
        ["--trainer.gradient_clip_val", "0.01", "--trainer.gradient_clip_algorithm", "value"],
        ["--trainer.gradient_clip_val", "0.5", "--trainer.callbacks+=test_loop.Within"],
        [*HALF, "--trainer.callbacks+=test_loop.Within"],
    ],
)
def test_the_lean_loop_leaves_what_lightnings_leaves(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    flags = [*flags, "--trainer.callbacks+=test_loop.Watching"]
    with monkeypatch.context() as patch:
        patch.setattr(LIGHTNINGS_STEP, refuse)
        Watching.seen = []
        lit_cifar.fit.main([*FEW, *flags])
        seen.append(Watching.seen)
    Watching.seen = []
    lit_cifar.fit.main([*FEW, *flags, "--trainer.profiler", "test_loop.Own"])
    seen.append(Watching.seen)
    assert seen[0] == seen[1]
    num_within = 4 if "--trainer.callbacks+=test_loop.Within" in flags else 0
    assert len(seen[0]) == (10 if flags[: len(HALF)] == HALF else 60) * (2 + num_within)
    assert_same_states("version_0", "version_1")


def assert_same_states(*runs: str) -> None:
    """Two runs have left the same bits and the same progress."""
    assert_same_run(*runs)
    lean, own = (torch.load(f"lightning_logs/{run}/checkpoints/last.ckpt", weights_only=True) for run in runs)
    for what in ("loops", "lr_schedulers", "MixedPrecision"):
        assert lean.get(what) == own.get(what)
    for index, state in own["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(lean["optimizer_states"][0]["state"][index], state, rtol=0, atol=0)


class NormedNet(nn.Sequential):
    """BatchNorm has statistics of its own on each rank of a CPU, of which rank 0's count; dropout draws from each."""

    def __init__(self, num_classes: int = 10) -> None:
        layers = (nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, num_classes))
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), *layers)


class Averaged(DDPStrategy):
    """DDP by Lightning's own class, with what a `--strategy` may add to it."""

    def __new__(cls) -> Any:
        state = PostLocalSGDState(None, None, start_localSGD_iter=2)
        return DDPStrategy(ddp_comm_state=state, model_averaging_period=3)


# The last of 6 batches is of one image, so that the second rank's share is empty. Validation comes in mid-epoch.
SHARED = (
    "--dataset shapes --accelerator cpu --devices 2 --batch_size 10 --max_epochs 3 --lr 0.05 --log_level debug "
    "--data.num_val 9949 --trainer.limit_val_batches 1 --trainer.val_check_interval 4 --trainer.limit_test_batches 1 "
    "--trainer.log_every_n_steps 2"
)
OWN = "--trainer.profiler test_loop.Own"
UNUSED = "--strategy ddp_find_unused_parameters_true"


def train(run_command: Run, *trainings: str) -> list[str]:
    """Trains once after the other on the same two processes; gives the debug lines that speak of the lean loop."""
    done = run_command("test_loop", *" then ".join(f"{SHARED} {flags}" for flags in trainings).split())
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "lean loop" in line]


def test_the_lean_loop_leaves_what_lightnings_leaves_on_2_processes(run_command: Run) -> None:
    flags = "--data.augment.crop 4 --data.augment.flip random"
    pieces = f"{flags} --trainer.max_steps 9", f"{flags} --trainer.max_steps -1 --resume lightning_logs/version_2"
    said = train(run_command, flags, f"{flags} {OWN}", *pieces)
    assert said == [f"{STANDS_ASIDE}the profiler is Own"], "the first rank says so, and no other"
    assert_same_states("version_0", "version_1")
    assert weights("version_0").keys() == weights("version_2").keys()
    for name, weight in weights("version_0").items():
        torch.testing.assert_close(weights("version_2")[name], weight, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        f"{UNUSED} --trainer.gradient_clip_val 0.5 --precision bf16-mixed",
        f"{UNUSED} --trainer.callbacks+=test_loop.Within --model.net test_loop.NormedNet --data.drop_last true",
        '--strategy {"class_path":"test_loop.Averaged"} --model.net test_loop.NormedNet --data.drop_last true',
    ],
)
def test_the_same_with_other_kinds_of_ddp(flags: str, run_command: Run) -> None:
    assert train(run_command, flags, f"{flags} {OWN}") == [f"{STANDS_ASIDE}the profiler is Own"]
    assert_same_states("version_0", "version_1")


STANDS_ASIDE = "lit_cifar: debug: Lightning's own loop takes each step, and the lean loop none: "


@pytest.mark.parametrize(
    ("flags", "is_lean"),
    [
        (["--trainer.accumulate_grad_batches", "2"], False),
        (["--trainer.profiler", "simple"], False),
        (["--data.transform", "[torchvision.transforms.v2.RandomHorizontalFlip]"], True),  # by a DeviceLoader too
    ],
)
def test_what_the_lean_loop_does_not_do_is_left_to_lightnings(
    flags: list[str], is_lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LIGHTNINGS_STEP, refuse)
        with nullcontext() if is_lean else pytest.raises(AssertionError, match="Lightning's own step"):
            lit_cifar.fit.main([*FEW, *flags])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "gradients of 2 batches are accumulated"),
        (["--trainer.profiler", "simple"], "the profiler is SimpleProfiler"),
        (["--trainer.gradient_clip_val", "1.0"], None),
        (["--trainer.callbacks+=test_loop.Within"], None),
        (["--precision", "bf16-mixed"], None),
    ],
)
def test_a_debug_line_says_once_why_the_lean_loop_stands_aside(
    flags: list[str], reason: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*FEW, "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2"]
    lit_cifar.fit.main([*few, *flags, "--log_level", "debug"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit_cifar: debug:")]
    assert lines == ([f"{STANDS_ASIDE}{reason}"] if reason else [])


def test_the_module_overrides_no_hook_that_the_lean_loop_leaves_out() -> None:
    for hook in (
        # but for on_before_backward, which logs the loss where no callback of the command does
        *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "backward"),
        *("on_after_backward", "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad"),
        *("configure_gradient_clipping", "on_before_batch_transfer", "on_after_batch_transfer"),
    ):
        assert getattr(LitClassifier, hook) is getattr(LightningModule, hook)
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        assert getattr(CIFAR10DataModule, hook) is getattr(LightningDataModule, hook)


def test_an_unknown_lightning_keeps_its_own_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made() -> type:
        command = CLI([*FEW, "--log_level", "debug"], prog="test", description="", logs=False)
        return type(command.trainer.fit_loop.epoch_loop)

    assert made() is loop.LeanEpochLoop
    assert STANDS_ASIDE not in capsys.readouterr().err
    monkeypatch.setattr(loop.lightning, "__version__", "2.9.0")
    assert made() is not loop.LeanEpochLoop
    assert f"{STANDS_ASIDE}it is not known to fit Lightning 2.9.0\n" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


if __name__ == "__main__":
    for flags in " ".join(sys.argv[1:]).split(" then "):
        lit_cifar.fit.main(flags.split())
        os.environ.pop(CHILD_VARIABLE, None)  # by which the first rank has told the other what to resume
