"""The lean loop against Lightning's own: the same bits, the same progress, the same calls of callbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, Run, assert_same_run
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lit_cifar.fit
from lit_cifar.cli.command import CLI
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.model.module import LitClassifier
from lit_cifar.training import loop

FEW = [*SHAPES, "--batch_size", "50", "--max_epochs", "2", "--trainer.limit_train_batches", "30", "--lr", "0.05"]


class Within(Callback):
    """Wants to be called within each step, which is Lightning's own loop's business."""

    calls = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Within.calls += 1


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


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Lightning's own step was taken")


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.schedule", "onecycle", "--model.warmup", "0.3", "--data.augment.flip", "random"],
        ["--precision", "bf16-mixed"],
        ["--data.num_val", "1000", "--trainer.val_check_interval", "10"],
    ],
)
def test_the_lean_loop_leaves_what_lightnings_leaves(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run", refuse)
        Watching.seen = []
        lit_cifar.fit.main([*FEW, *flags, "--trainer.callbacks+=test_loop.Watching"])
        seen.append(Watching.seen)
    Within.calls, Watching.seen = 0, []
    callbacks = ["--trainer.callbacks+=test_loop.Watching", "--trainer.callbacks+=test_loop.Within"]
    lit_cifar.fit.main([*FEW, *flags, *callbacks])
    seen.append(Watching.seen)
    assert Within.calls == 60
    assert seen[0] == seen[1]
    assert len(seen[0]) == 120
    assert_same_run("version_0", "version_1")
    lean, own = (
        torch.load(f"lightning_logs/version_{version}/checkpoints/last.ckpt", weights_only=True) for version in (0, 1)
    )
    assert lean["loops"] == own["loops"]
    assert lean["lr_schedulers"] == own["lr_schedulers"]
    for index, state in own["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(lean["optimizer_states"][0]["state"][index], state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.gradient_clip_val", "1.0"],
        ["--trainer.profiler", "simple"],
        ["--data.transform", "[torchvision.transforms.v2.RandomHorizontalFlip]"],
    ],
)
def test_what_the_lean_loop_does_not_do_is_left_to_lightnings(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run", refuse)
        if "--data.transform" in flags:  # its batches come from a DeviceLoader too
            lit_cifar.fit.main([*FEW, *flags])
        else:
            with pytest.raises(AssertionError, match="Lightning's own step"):
                lit_cifar.fit.main([*FEW, *flags])


class BeforeBackward(Callback):
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Is called within each step."""


STANDS_ASIDE = "lit_cifar: debug: Lightning's own loop takes each step, and the lean loop none: "


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "gradients of 2 batches are accumulated"),
        (["--trainer.gradient_clip_val", "1.0"], "gradients are clipped to 1.0"),
        (["--trainer.profiler", "simple"], "the profiler is SimpleProfiler"),
        (
            ["--trainer.callbacks+=test_loop.BeforeBackward"],
            "BeforeBackward.on_before_backward is called within each step",
        ),
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


def test_the_first_rank_says_that_another_strategy_is_not_lean(run_command: Run) -> None:
    few = [*FEW, "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2", "--log_level", "debug"]
    done = run_command("lit_cifar.fit", *few, "--devices", "2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "lean loop" in line]
    assert lines == [f"{STANDS_ASIDE}the strategy is DDPStrategy"]


def test_the_module_overrides_no_hook_that_the_lean_loop_leaves_out() -> None:
    for hook in (
        *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "backward"),
        *("on_after_backward", "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad"),
        *("configure_gradient_clipping", "lr_scheduler_step", "on_before_batch_transfer", "on_after_batch_transfer"),
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
