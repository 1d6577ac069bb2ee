"""A signal stops a training at a step's end, on all ranks, with its state saved; a damaged state is passed over."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, SHAPES, assert_same_run, results, scalars, weights
from lightning.pytorch import Callback, Trainer

import lit_cifar.fit
from lit_cifar.errors import UserError
from lit_cifar.run.read import find_checkpoint, states_of
from lit_cifar.run.stop import STOPPED, Agreement, Stopped
from lit_cifar.run.write import keep

if sys.platform == "win32":
    pytest.skip("Windows has neither these signals nor sessions", allow_module_level=True)

ARGS = [*SHAPES, "--batch_size", "20", "--max_epochs", "2", "--lr", "0.01", "--data.augment.crop", "4",
        "--model.schedule", "onecycle", "--running_loss.every_n_steps", "20"]  # fmt: skip


class Training:
    """A fit in a session of its own, whose output is followed."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lit_cifar.fit", *args],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}:\n{self.output}")

    def ranks(self) -> list[int]:
        """Process ids, rank 0's first."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "-g", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        others = [int(pid) for pid in found.stdout.split() if int(pid) != self.process.pid]
        return [self.process.pid, *others]

    def end(self, timeout: float = 120) -> int:
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait(timeout)


@pytest.fixture
def trainings() -> Iterator[list[Training]]:
    started: list[Training] = []
    yield started
    for training in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(training.process.pid, signal.SIGKILL)
        training.process.wait()
        assert training.process.stdout is not None
        training.process.stdout.close()


@pytest.mark.parametrize(
    ("devices", "number", "to"),
    [
        pytest.param(1, signal.SIGTERM, "rank 0", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGUSR1, "rank 0", marks=pytest.mark.slow),
        (2, signal.SIGUSR1, "rank 1"),
        pytest.param(2, signal.SIGTERM, "rank 0", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, "all", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_and_the_resumed_run_ends_the_same(
    devices: int, number: int, to: str, trainings: list[Training]
) -> None:
    args = [*ARGS, "--devices", str(devices)]
    training = Training(*args)
    trainings.append(training)
    training.wait_for("epoch 1  step  20")
    ranks = training.ranks()
    assert len(ranks) == devices
    for pid in {"rank 0": ranks[:1], "rank 1": ranks[1:], "all": ranks}[to]:
        os.kill(pid, number)
        os.kill(pid, number)  # a second one does no harm
    assert training.end() == STOPPED, training.output
    assert training.output.count("go on with --resume lightning_logs/version_0/checkpoints/last.ckpt") == 1
    assert "Traceback" not in training.output
    step = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 20 <= step < 500

    resumed = Training(*args, "--resume", "auto")
    trainings.append(resumed)
    assert resumed.end(240) == 0, resumed.output
    whole = Training(*args)
    trainings.append(whole)
    assert whole.end(240) == 0, whole.output
    assert_same_run("version_0", "version_1")


def test_an_interrupt_and_another_end_a_training_in_silence(trainings: list[Training]) -> None:
    training = Training(*ARGS, "--checkpoint.every_n_train_steps", "10", "--log_level", "info")
    trainings.append(training)
    training.wait_for("epoch 1  step  20")
    os.kill(training.process.pid, signal.SIGINT)
    os.kill(training.process.pid, signal.SIGINT)
    assert training.end() == 130, training.output
    assert "Traceback" not in training.output
    assert torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 10


def test_a_signal_after_the_last_step_of_an_epoch_stops_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_cifar.training.progress import Progress

    def interrupt(self: Progress, trainer: object, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "on_validation_start", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="by SIGTERM after step 90;"):
        lit_cifar.fit.main([*SHAPES, "--batch_size", "100", "--data.num_val", "1000"])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_save_is_due_after_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    from lit_cifar.run.save import Checkpoints

    def save(self: Checkpoints, trainer: object, name: str) -> None:
        saved.append(trainer.global_step)  # type: ignore[attr-defined]
        self._saved_at = time.monotonic()

    monkeypatch.setattr(Checkpoints, "_save", save)
    lit_cifar.fit.main([*SHAPES, "--batch_size", "50", "--max_epochs", "1", "--checkpoint.every_n_minutes", "0.005"])
    assert saved[-1] == 200
    assert len(saved) > 1
    assert all(step % 1000 for step in saved)


def test_one_rank_alone_agrees_with_itself_at_once() -> None:
    agreement = Agreement()
    assert agreement.ask(False, True) == (False, True)
    assert agreement.ask(True, False, wait=True) == (True, False)


@pytest.mark.parametrize("num_kept", [1, 2, 4])
def test_the_newest_states_are_kept_in_order(num_kept: int, tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    for step in range(6):
        keep(last, num_kept)
        keep(last, num_kept)  # as after a kill between this and the save
        last.with_suffix(".new").write_text(str(step))
        os.replace(last.with_suffix(".new"), last)
    assert [path.read_text() for path in states_of(tmp_path)] == ["5", "4", "3", "2"][:num_kept]


def test_a_damaged_state_is_named_and_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    each = ["--checkpoint.epoch_end_seconds", "0"]
    lit_cifar.fit.main([*SHAPES, "--batch_size", "500", "--max_epochs", "3", *each])
    folder = Path("lightning_logs/version_0/checkpoints")
    newest, before = states_of(folder.parent)
    assert (newest.name, before.name) == ("last.ckpt", "last-1.ckpt")
    assert find_checkpoint("auto", Path()) == newest
    newest.write_bytes(newest.read_bytes()[:20_000])
    capsys.readouterr()
    assert find_checkpoint("auto", Path()) == before
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(newest) in told
    assert torch.load(before, weights_only=True)["global_step"] == 40
    before.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint that is whole"):
        find_checkpoint("auto", Path())


def test_if_any_starts_a_run_where_there_is_none_and_goes_on_where_there_is_one() -> None:
    args = [*SHAPES, "--batch_size", "500", "--max_epochs", "1", "--resume", "if-any"]
    lit_cifar.fit.main(args)
    assert sorted(os.listdir("lightning_logs")) == ["version_0"]
    lit_cifar.fit.main([*args, "--max_epochs", "2"])
    assert sorted(os.listdir("lightning_logs")) == ["version_0"]
    assert torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    lit_cifar.fit.main([*SHAPES, "--batch_size", "500", "--max_epochs", "1"])
    debris = Path("lightning_logs/version_0/checkpoints/.last.ckpt.abc.part")
    debris.write_bytes(b"half")
    lit_cifar.fit.main(["--resume", "lightning_logs/version_0", "--max_epochs", "2"])
    assert not debris.exists()


class SignalAt(Callback):
    """Has a signal come in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)


def test_the_validation_after_the_step_of_a_signal_is_made_up_for_when_the_run_goes_on() -> None:
    limits = ["--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1", "--max_epochs", "1"]
    flags = [*ARGS, *limits, "--trainer.limit_test_batches", "1", "--data.num_val", "20", "--log_level", "warning"]
    flags += ["--trainer.val_check_interval", "3"]
    lit_cifar.fit.main(flags)
    callback = ["--trainer.callbacks+=test_stop.SignalAt", "--trainer.callbacks.step", "3"]
    with pytest.raises(Stopped, match="after step 3"):
        lit_cifar.fit.main([*flags, *callback])
    assert "val/accuracy" not in scalars("version_1")
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true"])
    assert_same_run("version_0", "version_1")


# ---- runs that a callback ends ----


@pytest.mark.parametrize("interval", ["1.0", "2"])  # of validations: at an epoch's end, and within it
def test_a_run_that_a_callback_ended_is_resumed_at_its_end(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "mode": "max"}}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))
    few = ["--trainer.limit_train_batches", "5", "--trainer.limit_test_batches", "1", "--data.num_val", "20"]
    flags = [*SHAPES, "--batch_size", "20", "--config", "run.yaml", *few, "--trainer.val_check_interval", interval]
    lit_cifar.fit.main([*flags, "--lr", "0.01", "--max_epochs", "9"])
    ended, end = results("version_0"), weights("version_0")
    assert ended["num_steps"] < 45
    capsys.readouterr()
    Path("lightning_logs/version_0/results.json").unlink()  # as if it had been killed in its test
    lit_cifar.fit.main(["--resume", "auto"])
    assert "a callback has ended this run" in capsys.readouterr().err
    assert results("version_0")["num_steps"] == ended["num_steps"]
    assert all(torch.equal(weight, weights("version_0")[name]) for name, weight in end.items())
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "10"])
    assert results("version_0")["num_steps"] > ended["num_steps"]
