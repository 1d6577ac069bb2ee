"""Checkpoints survive a full disk, runs do not share folders, and a file that is read runs no code."""

import errno
import io
import math
import os
import pickle
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SHAPES, assert_same_run, disk_with_room_for, error_of, results, scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from pretend import pretended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils._pytree import tree_leaves

import lit_cifar.fit
from lit_cifar.model.module import LitClassifier
from lit_cifar.run import save as save_module
from lit_cifar.run.folder import RUNS, Run
from lit_cifar.run.logger import RunLogger
from lit_cifar.run.read import find_checkpoint, read_checkpoint
from lit_cifar.run.save import Checkpoints
from lit_cifar.run.write import DurableCheckpointIO, get_random_state, set_random_state
from lit_cifar.training.loop import LeanEpochLoop

CHECKPOINT = {
    "state_dict": {"net.weight": torch.arange(250_000.0)},
    "global_step": 1,
    "pytorch-lightning_version": "2.6.6",
    "lit_cifar": {"classes": ["a"], "config": {}},
}


# ---- writing ----


def save(path: Path) -> None:
    DurableCheckpointIO().save_checkpoint(CHECKPOINT, path)


def test_a_gpus_tensors_are_saved_as_a_cpus_and_copied_without_waiting_for_each(tmp_path: Path) -> None:
    def state(device: str) -> dict[str, Any]:
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
            memory_format=torch.channels_last
        )
        torch.nn.init.ones_(net[0].weight)
        torch.nn.init.ones_(net[0].bias)  # type: ignore[arg-type]
        momenta = [
            {"momentum_buffer": torch.arange(6.0).view(2, 3).t().to(device), "scale": torch.tensor(2).to(device)}
        ]
        return {"state_dict": net.to(device).state_dict(), "optimizer_states": momenta, "classes": ("a", "b")}

    DurableCheckpointIO().save_checkpoint(state("cpu"), tmp_path / "cpu.ckpt")
    with pretended("cuda") as device:
        on_device = state("cuda:0")
        device.waits.clear()
        DurableCheckpointIO().save_checkpoint(on_device, tmp_path / "cuda.ckpt")
    assert {kind for kind, *_ in device.waits} == {"d2h async"}
    torch.save(state("cpu"), tmp_path / "plain.ckpt")
    cpu, cuda, plain = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("cpu", "cuda", "plain"))
    for saved in (cpu, cuda):
        assert saved["state_dict"]._metadata == plain["state_dict"]._metadata
        for one, other in zip(tree_leaves(saved), tree_leaves(plain), strict=True):
            if isinstance(other, torch.Tensor):
                assert (one.dtype, one.stride(), one.device) == (other.dtype, other.stride(), other.device)
                assert torch.equal(one, other)
            else:
                assert one == other


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"the one before")
    return path


def check_untouched(path: Path) -> None:
    assert path.read_bytes() == b"the one before"
    assert os.listdir(path.parent) == [path.name], "nothing is left behind"


@pytest.mark.parametrize("room", [0, 100, 500_000, 1_000_000])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_whole(last: Path, room: int) -> None:
    with disk_with_room_for(room):
        message = error_of(save, last)
    assert str(last) in message
    assert f"ckpt_path={str(last)!r}" in message
    check_untouched(last)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC)),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), os.strerror(errno.EACCES)),
        (RuntimeError("file write failed\n at inline_container.cc"), "file write failed"),
    ],
)
def test_a_save_that_fails_half_way_says_why(
    last: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def save_half(checkpoint: object, file: io.BufferedWriter, **options: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    assert f"({reason})" in error_of(save, last)
    check_untouched(last)


def test_a_checkpoint_reads_back_and_takes_the_place_of_the_one_before(last: Path) -> None:
    save(last)
    loaded = read_checkpoint(last)
    assert torch.equal(loaded["state_dict"]["net.weight"], torch.arange(250_000.0))
    assert loaded["lit_cifar"] == CHECKPOINT["lit_cifar"]
    assert os.listdir(last.parent) == [last.name]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:

        def spy(*args: Any, name: str = name) -> Any:
            calls.append(name)
            return real[name](*args)

        monkeypatch.setattr(os, name, spy)
    save(last)
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value: float) -> None:
    def checkpoint(value: float) -> dict[str, Any]:
        return {"state_dict": {"net.counts": torch.tensor([1]), "net.bias": torch.tensor([0.0, value])}}

    trainer: Any = SimpleNamespace(global_step=12)
    Checkpoints().on_save_checkpoint(trainer, None, checkpoint(1.0))  # type: ignore[arg-type]
    message = error_of(Checkpoints().on_save_checkpoint, trainer, None, checkpoint(value))
    assert message.startswith("step 12: net.bias is not finite")


@pytest.mark.parametrize(
    "setting", [{"every_n_train_steps": 0}, {"every_n_minutes": 0.0}, {"epoch_end_seconds": -1.0}, {"num_kept": 0}]
)
def test_a_setting_out_of_its_range_is_refused(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    assert f"{name}={value} is out of range" in error_of(lambda: Checkpoints(**setting))


# ---- when ----

SHORT_EPOCHS = [
    *SHAPES,
    "--batch_size",
    "20",
    "--trainer.limit_train_batches",
    "3",
    "--trainer.limit_test_batches",
    "1",
]
ONLY_AT_THE_END = ["--checkpoint.epoch_end_seconds", "1e9"]


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and step of each save of a run whose steps take five seconds."""
    noted: list[tuple[str, int]] = []
    num_steps = 0

    def note(self: Checkpoints, trainer: Trainer, name: str, real: Any = Checkpoints._save) -> None:
        noted.append((name, trainer.global_step))
        real(self, trainer, name)

    def step(self: Checkpoints, *args: Any, real: Any = Checkpoints.on_train_batch_end) -> None:
        nonlocal num_steps
        num_steps += 1
        real(self, *args)

    monkeypatch.setattr(Checkpoints, "_save", note)
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", step)
    monkeypatch.setattr(save_module, "time", SimpleNamespace(monotonic=lambda: 5.0 * num_steps, perf_counter=float))
    return noted


class EndsRun(Callback):
    """Ends a run at the end of its second epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--max_epochs", "5"], [6, 12, 15]),  # an epoch takes 15 seconds
        (["--max_epochs", "1"], [3]),
        (["--max_epochs", "3", "--checkpoint.epoch_end_seconds", "0"], [3, 6, 9]),
        (["--max_epochs", "3", "--checkpoint.epoch_end_seconds", "15.5"], [6, 9]),
        (["--max_epochs", "3", *ONLY_AT_THE_END], [9]),
        (["--max_epochs", "-1", "--trainer.max_steps", "6", *ONLY_AT_THE_END], [6]),
        (["--max_epochs", "-1", "--trainer.max_steps", "5", *ONLY_AT_THE_END], [5]),
        (["--max_epochs", "3", "--trainer.callbacks+=test_checkpoint.EndsRun", *ONLY_AT_THE_END], [6]),
        (["--max_epochs", "3", "--checkpoint.every_n_train_steps", "3", *ONLY_AT_THE_END], [3, 6, 9]),
        (["--max_epochs", "3", "--checkpoint.every_n_train_steps", "2", *ONLY_AT_THE_END], [2, 4, 6, 8, 9]),
        (["--max_epochs", "4", "--checkpoint.every_n_minutes", "0.5", *ONLY_AT_THE_END], [6, 12]),
    ],
)
def test_an_epochs_end_is_saved_after_some_seconds_and_a_runs_end_always(
    flags: list[str], steps: list[int], saves: list[tuple[str, int]]
) -> None:
    lit_cifar.fit.main([*SHORT_EPOCHS, *flags])
    assert saves == [("last", step) for step in steps]
    assert read_checkpoint(RUNS / "version_0" / "checkpoints" / "last.ckpt").step == steps[-1]


def test_a_best_state_is_never_newer_than_the_last(saves: list[tuple[str, int]]) -> None:
    # or a run that is killed and resumed would have to give it up, with the states after its last
    flags = ["--max_epochs", "4", "--data.num_val", "100", "--lr", "0", "--checkpoint.monitor", "val/accuracy"]
    lit_cifar.fit.main([*SHORT_EPOCHS, *flags, *ONLY_AT_THE_END])
    assert saves == [("best", 3), ("last", 3), ("last", 12)]


def test_a_run_that_its_module_ends_unannounced_is_saved(
    saves: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: LitClassifier, *args: Any) -> None:  # which comes after the callbacks' own
        self.trainer.should_stop = self.trainer.global_step == 4

    monkeypatch.setattr(LitClassifier, "on_train_batch_end", stop)
    monkeypatch.setattr(LeanEpochLoop, "_find_obstacle", lambda *args: "a module's hook")
    lit_cifar.fit.main([*SHORT_EPOCHS, "--max_epochs", "3", *ONLY_AT_THE_END])
    assert saves == [("last", 4)]
    assert results("version_0")["checkpoint"] == "last"
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "4"])
    assert saves[-1] == ("last", 12), "no batch of the epoch that was ended within is left out"


@pytest.mark.parametrize("says", [True, False])
def test_ranks_save_an_epochs_end_together(says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    saved: list[str] = []

    def ask(*questions: bool, wait: bool) -> tuple[bool, bool]:
        asked.append(questions)
        return False, says

    callback = Checkpoints(epoch_end_seconds=0.0 if not says else math.inf)
    monkeypatch.setattr(callback, "_agreement", SimpleNamespace(ask=ask))
    monkeypatch.setattr(callback, "_save", lambda trainer, name: saved.append(name))
    progress = SimpleNamespace(current=SimpleNamespace(processed=1))
    trainer: Any = SimpleNamespace(is_last_batch=True, global_step=7, max_steps=-1, should_stop=False)
    trainer.fit_loop = SimpleNamespace(max_epochs=9, epoch_progress=progress)
    callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert asked[0] == (False, not says), "what this rank thinks"
    assert saved == (["last"] if says else []), "what all have agreed on"


def test_a_run_killed_after_an_epoch_that_was_not_saved_ends_with_the_same_bits() -> None:
    flags = [*SHORT_EPOCHS, "--max_epochs", "4", "--checkpoint.every_n_train_steps", "5", *ONLY_AT_THE_END]
    flags += ["--data.augment.crop", "4", "--data.augment.flip", "alternating", "--lr", "0.05"]
    lit_cifar.fit.main(flags)
    with pytest.raises(ZeroDivisionError):
        lit_cifar.fit.main([*flags, "--trainer.callbacks+=test_checkpoint.BreaksRun"])
    killed = RUNS / "version_1"
    assert read_checkpoint(killed / "checkpoints" / "last.ckpt").step == 5, "within the second of three epochs"
    lit_cifar.fit.main(["--resume", str(killed), "--trust", "true", "--trainer.callbacks", "null"])
    assert_same_run("version_0", "version_1")


class BreaksRun(Callback):
    """Ends a run, as `kill -9` would, at the beginning of its fourth epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 3:
            raise ZeroDivisionError


def test_a_resumed_run_continues_the_random_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "_take_signals", lambda self: None)  # nobody would give them back

    def trainer(world_size: int) -> Trainer:
        place = {"global_rank": 0, "is_global_zero": True, "log_dir": None, "callbacks": []}
        fit_loop = SimpleNamespace(restarted_mid_epoch=False)
        return SimpleNamespace(global_step=7, world_size=world_size, fit_loop=fit_loop, **place)  # type: ignore[return-value]

    torch.manual_seed(5)
    state = get_random_state()
    draws = torch.rand(3)
    callback = Checkpoints()
    callback.load_state_dict({"best_score": 0.5, "random_states": [state]})  # as of version 0.1.0
    callback.on_train_start(trainer(1), None)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), draws)
    callback.load_state_dict({"best_score": 0.5, "random_states": [state]})
    set_random_state(state)
    torch.rand(3)
    following = torch.rand(3)
    set_random_state(state)
    torch.rand(3)
    callback.on_train_start(trainer(2), None)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), following), "on another number of ranks the draws are left alone"


# ---- events ----


def logger_of(place: Path, resumed_step: int | None = None) -> RunLogger:
    folder = place / RUNS / "version_0"
    folder.mkdir(parents=True, exist_ok=True)
    return RunLogger(Run(folder=folder), resumed_step)


def test_metrics_are_logged_as_lightnings_own_logger_does(tmp_path: Path) -> None:
    seen = []
    for logger in (logger_of(tmp_path / "ours"), TensorBoardLogger(str(tmp_path / "own"))):
        for step in (5, 7):
            logger.log_metrics({"train/loss": 1.5 / step, "lr/net": torch.tensor(0.1)}, step=step)
        logger.log_metrics({"curves": {"one": 1.0, "two": 2.0}}, step=9)
        logger.save()
        logger.finalize("success")
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert set(events.Tags()["scalars"]) == {"train/loss", "lr/net"}
        seen.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
        assert (Path(logger.log_dir) / "curves_one").is_dir(), "a run of its own for each of the curves in one chart"
    assert seen[0] == seen[1]


@pytest.mark.parametrize("number", [8, 98])
def test_a_run_is_read_in_its_order_whatever_the_process_wrote_before(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's readers take files by name: of those of one second, a process's 10th comes before its 9th."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(number))
    now = time.time()
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: now))  # all in one second
    flags = ["--dataset", "shapes", "--trainer.max_steps", "3", "--trainer.limit_test_batches", "1"]
    lit_cifar.fit.main(flags)
    lit_cifar.fit.main(["--resume", "lightning_logs/version_0", "--trainer.max_steps", "5"])
    assert len(list(Path("lightning_logs/version_0").glob("events.*"))) == 2, "one of each command"
    assert [step for step, _ in scalars("version_0")["test/loss"]] == [3, 5]


OURS = {
    "state_dict": {},
    "global_step": 1,
    "pytorch-lightning_version": "2.6.6",
    "lit_cifar": {"classes": ["cat", "dog"], "config": {}},
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for version in (9, 10, 11):
        folder = tmp_path / RUNS / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        if version != 11:  # stopped before its first checkpoint
            torch.save(OURS, folder / "last.ckpt")
    return tmp_path / RUNS


def test_auto_is_the_newest_run_by_number_that_has_a_checkpoint(runs: Path) -> None:
    assert find_checkpoint("auto", runs.parent) == runs / "version_10" / "checkpoints" / "last.ckpt"


def test_a_run_is_resumed_by_its_folder_or_its_file(runs: Path) -> None:
    path = runs / "version_9" / "checkpoints" / "last.ckpt"
    assert find_checkpoint(str(runs / "version_9"), runs.parent) == path
    assert find_checkpoint(str(path), runs.parent) == path


@pytest.mark.parametrize("resume", ["auto", "absent.ckpt", "."])
def test_nothing_to_resume_is_said_with_what_was_asked_for(tmp_path: Path, resume: str) -> None:
    assert error_of(find_checkpoint, resume, tmp_path / "empty").startswith("ckpt_path")


# ---- reading ----


class Gadget:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "in a checkpoint"])
def test_reading_a_checkpoint_runs_no_code_from_it(tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / "last.ckpt", tmp_path / "marker"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Gadget(marker)))
    else:
        torch.save(Gadget(marker) if kind == "torch" else {**CHECKPOINT, "more": Gadget(marker)}, path)
    assert str(path) in error_of(read_checkpoint, path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the file is as dangerous as it should be for this test"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_checkpoint_cut_short_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert error_of(read_checkpoint, path).startswith(f"{path} is no checkpoint, or was cut short or damaged")


def zip_of_text() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize(  # ids, because a zip has the time in it, and workers must find the same tests
    "data",
    [b"seed: 7\nmodel:\n  lr: 0.1\n", b"\x89PNG\r\n\x1a\n" + bytes(64), zip_of_text()],
    ids=["yaml", "png", "zip"],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    assert error_of(read_checkpoint, path).startswith(f"{path} is no checkpoint")


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {}}, {"lit_cifar": {}}, [1, 2], None])
def test_a_torch_file_of_another_kind_is_told_from_a_checkpoint(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert error_of(read_checkpoint, path).startswith(f"{path} is not a checkpoint of lit_cifar")


def test_a_checkpoint_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    assert error_of(read_checkpoint, tmp_path / "absent.ckpt").startswith(f"no checkpoint {tmp_path / 'absent.ckpt'}")
    assert str(tmp_path) in error_of(read_checkpoint, tmp_path)
