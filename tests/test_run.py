"""A run is one object: its folder is its own, wherever it lies, and nothing of one run is written into another's."""

import csv
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run as RunCommand
from helpers import disk_with_room_for, error_of, results
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

import lit_cifar.fit
import lit_cifar.test
from lit_cifar import runs
from lit_cifar.errors import UserError
from lit_cifar.run.folder import IDENTITY, RUNS, Run, read_identity
from lit_cifar.run.logger import RunLogger
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.save import Checkpoints
from lit_cifar.run.write import DurableCheckpointIO
from lit_cifar.text import in_command

SHORT = ["--dataset", "shapes", "--accelerator", "cpu", "--batch_size", "50", "--trainer.limit_train_batches", "4"]
SHORT += ["--trainer.limit_test_batches", "2"]
CSV = "lightning.pytorch.loggers.CSVLogger"


def fit(*args: str) -> None:
    lit_cifar.fit.main([*SHORT, *args])


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


# ---- claiming a folder ----


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / RUNS / "version_9").mkdir(parents=True)
    (tmp_path / RUNS / "version_old").mkdir()
    runs = [Run.new(tmp_path) for _ in range(8)]
    barrier = threading.Barrier(len(runs))

    def claim(run: Run) -> None:
        barrier.wait()
        run.claim()
        run.claim()

    threads = [threading.Thread(target=claim, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.folder.name for run in runs) == sorted(f"version_{version}" for version in range(10, 18))
    assert len({read_identity(run.folder) for run in runs}) == len(runs)


def test_a_folder_taken_between_looking_and_making_is_left_to_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Run.new(tmp_path)
    first.claim()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    second = Run.new(tmp_path)
    second.claim()
    assert (first.folder.name, second.folder.name) == ("version_0", "version_1")


@pytest.mark.parametrize("in_the_way", ["file", "dangling link"])
def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path, in_the_way: str) -> None:
    if in_the_way == "file":
        (tmp_path / RUNS).write_bytes(b"")
    else:
        (tmp_path / RUNS).symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot make a folder for the run in .*lightning_logs"):
        Run.new(tmp_path).claim()


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    run = Run.new(tmp_path)
    run.claim()
    run.release()
    assert os.listdir(tmp_path) == []
    run.claim()
    run.config.write_text("seed_everything: 0\n")
    run.release()
    assert run.config.is_file(), "what somebody wrote into stays"


class Nowhere(Logger):
    """Stands for a logger of another package, which writes to no folder."""

    name, version = "nowhere", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Does nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


class Unreachable(Nowhere):
    """A logger whose server is not there."""

    def __init__(self) -> None:
        raise ConnectionError("no route to host")


def test_a_logger_that_cannot_be_made_ends_in_one_line_and_leaves_no_folder() -> None:
    with pytest.raises(UserError, match=r"--trainer\.logger test_run\.Unreachable cannot be made: .*no route to host"):
        fit("--trainer.logger", "test_run.Unreachable")
    assert os.listdir() == []


# ---- the folder that a checkpoint lies in ----


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.new(tmp_path)
    run.claim()
    run.checkpoint("last").parent.mkdir()
    return run


def test_a_run_is_found_by_its_checkpoint_wherever_it_lies(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archive").mkdir()
    moved = run.folder.rename(tmp_path / "archive" / "my run")
    (tmp_path / "link").symlink_to(moved)
    monkeypatch.chdir(tmp_path)
    for folder in ("archive/my run", "link", "archive/../link"):
        found = Run.of(Path(folder) / "checkpoints" / "last.ckpt", run.identity)
        assert found is not None
        assert found.folder.samefile(moved)
        assert "link" in str(found.folder) or "my run" in str(found.folder)
    monkeypatch.chdir(moved / "checkpoints")
    assert Run.of(Path("last.ckpt"), run.identity).folder == moved  # type: ignore[union-attr]


def test_a_checkpoint_in_no_run_or_in_anothers_has_no_run(run: Run, tmp_path: Path) -> None:
    last = run.checkpoint("last")
    assert Run.of(last, "another") is None
    assert Run.of(last, None) is None, "a state of version 0.1.0 in a newer run's folder"
    assert Run.of(run.folder / "last.ckpt", run.identity) is None
    (tmp_path / "checkpoints").mkdir()
    assert Run.of(tmp_path / "checkpoints" / "last.ckpt", run.identity) is None


def test_a_run_of_version_0_1_0_has_no_identity_and_goes_on(run: Run) -> None:
    (run.folder / IDENTITY).unlink()
    assert Run.of(run.checkpoint("last"), None) is None, "a folder of that name alone is no run's"
    run.config.write_text("seed_everything: 0\n")
    assert Run.of(run.checkpoint("last"), None) is not None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 3}', "[" * 10_000])
def test_a_spoilt_identity_is_none(run: Run, content: str) -> None:
    (run.folder / IDENTITY).write_text(content)
    assert read_identity(run.folder) is None


# ---- what a training run does with it ----


def test_every_state_carries_the_runs_identity() -> None:
    fit("--max_epochs", "2", "--data.num_val", "100")
    states = {path.name: read_checkpoint(path) for path in (RUNS / "version_0" / "checkpoints").iterdir()}
    assert states.keys() == {"last.ckpt", "last-1.ckpt", "best.ckpt"}
    assert {state.identity for state in states.values()} == {read_identity(RUNS / "version_0")}


def test_a_run_that_was_moved_goes_on_where_it_lies_now() -> None:
    fit("--max_epochs", "1")
    Path("archive").mkdir()
    moved = (RUNS / "version_0").rename("archive/mine")
    fit("--max_epochs", "1", "--lr", "0.5")  # takes the name that is free now
    before = contents(RUNS / "version_0")
    lit_cifar.fit.main(["--resume", "archive/mine", "--max_epochs", "2"])
    assert results(moved.resolve())["num_steps"] == 8
    assert contents(RUNS / "version_0") == before
    assert sorted(os.listdir(RUNS)) == ["version_0"]
    assert sorted(os.listdir("archive")) == ["mine"]


def test_a_checkpoint_outside_its_run_begins_a_new_one() -> None:
    fit("--max_epochs", "1")
    shutil.copy(RUNS / "version_0" / "checkpoints" / "last.ckpt", "mine.ckpt")
    fit("--max_epochs", "1", "--lr", "0.5")
    copied = shutil.copy("mine.ckpt", RUNS / "version_1" / "checkpoints" / "mine.ckpt")
    before = contents(RUNS / "version_0"), contents(RUNS / "version_1")
    for number, path in enumerate(("mine.ckpt", copied), start=2):
        lit_cifar.fit.main(["--resume", str(path), "--max_epochs", "2"])
        assert results(f"version_{number}")["num_steps"] == 8
        assert read_identity(RUNS / f"version_{number}") not in (None, read_identity(RUNS / "version_0"))
    assert before == (contents(RUNS / "version_0"), contents(RUNS / "version_1"))


def test_a_checkpoint_outside_its_run_does_not_say_where_the_new_one_is() -> None:
    fit("--max_epochs", "1", "--trainer.default_root_dir", "theirs")
    shutil.copy(Path("theirs") / RUNS / "version_0" / "checkpoints" / "last.ckpt", "mine.ckpt")
    lit_cifar.fit.main(["--resume", "mine.ckpt", "--max_epochs", "2"])
    assert results("version_0")["num_steps"] == 8
    assert os.listdir(Path("theirs") / RUNS) == ["version_0"]


@pytest.mark.parametrize(
    "logger",
    [
        ["--trainer.logger", "false"],
        ["--trainer.logger", "true"],
        ["--trainer.logger", CSV, "--trainer.logger.save_dir", "."],
        ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "."],
        ["--trainer.logger", "test_run.Nowhere"],
    ],
    ids=["none", "own", "csv", "tensorboard", "another"],
)
def test_every_run_has_a_folder_of_its_own_whatever_logger_is_chosen(logger: list[str]) -> None:
    fit("--max_epochs", "1", *logger)
    before = contents(RUNS / "version_0")
    fit("--max_epochs", "1", *logger)
    assert contents(RUNS / "version_0") == before
    assert sorted(os.listdir()) == ["lightning_logs"]
    assert sorted(os.listdir(RUNS)) == ["version_0", "version_1"]
    for run in RUNS.iterdir():
        assert {"config.yaml", "results.json", "checkpoints/last.ckpt"} <= contents(run).keys()
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2", "--trust", "true"])
    assert results("version_1")["num_steps"] == 8
    after = contents(RUNS / "version_0")
    assert after == before
    if CSV in logger:
        with (RUNS / "version_1" / "metrics.csv").open(newline="") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["test/accuracy"]]
        assert steps == [4, 8], "the first part's figures are kept"


def test_a_place_that_was_chosen_for_a_logger_is_its_own() -> None:
    fit("--max_epochs", "1", "--trainer.logger", CSV, "--trainer.logger.save_dir", "elsewhere")
    assert len(list(Path("elsewhere").rglob("metrics.csv"))) == 1
    assert "results.json" in contents(RUNS / "version_0")


def test_lightnings_own_callbacks_write_into_the_runs_folder() -> None:
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.logger", "false"]
    fit("--max_epochs", "1", *callback)
    assert [path.name for path in (RUNS / "version_0" / "checkpoints").glob("epoch*")] == ["epoch=0-step=4.ckpt"]
    assert os.listdir() == ["lightning_logs"]


@pytest.mark.slow
def test_a_rank_in_the_environment_of_a_single_device_means_nothing(run_command: RunCommand) -> None:
    for version in ("version_0", "version_1"):
        done = run_command("lit_cifar.fit", *SHORT, "--max_epochs", "1", RANK="1", SLURM_PROCID="1", LOCAL_RANK="1")
        assert (done.returncode, "Accuracy" in done.stdout) == (0, True), done.stderr
        assert {"config.yaml", "results.json", "checkpoints/last.ckpt"} <= contents(RUNS / version).keys()
        assert list((RUNS / version).glob("events.*"))
    done = run_command("lit_cifar.fit", "--devcies", "2", RANK="1", LOCAL_RANK="1")
    assert done.returncode == 2
    assert "unknown flag --devcies" in done.stderr


# ---- the best state, and what is reported ----

VALIDATED = ["--data.num_val", "1000", "--lr", "0.05", "--trainer.limit_train_batches", "40"]


def test_a_best_state_of_another_run_or_an_abandoned_line_is_not_tested() -> None:
    fit("--max_epochs", "2", *VALIDATED)
    run = RUNS / "version_0" / "checkpoints"
    fit("--max_epochs", "1", *VALIDATED, "--seed", "1")
    shutil.copy(RUNS / "version_1" / "checkpoints" / "best.ckpt", run / "best.ckpt")  # another run's
    lit_cifar.fit.main(["--resume", str(run / "last.ckpt"), "--trainer.max_epochs", "2"])
    assert results(run.parent.resolve())["checkpoint"] == "last"

    # back to the state after the first epoch: best.ckpt, of the second, belongs to a line that was given up
    fit("--max_epochs", "2", *VALIDATED)
    run = RUNS / "version_2" / "checkpoints"
    best = read_checkpoint(run / "best.ckpt")
    assert best.step == 80, "the second epoch's"
    lit_cifar.fit.main(["--resume", str(run / "last-1.ckpt"), "--max_epochs", "2", "--lr", "0"])
    again = read_checkpoint(run / "best.ckpt")
    assert again.chosen["best_score"] < best.chosen["best_score"]
    assert results(run.parent.resolve())["checkpoint"] == "best"
    lit_cifar.test.main(["--ckpt_path", str(run / "best.ckpt"), "--output", "best.json"])
    assert json.loads(Path("best.json").read_text())["num_steps"] == again.step == 80


def test_what_weight_averaging_leaves_is_saved_under_the_name_that_the_report_gives() -> None:
    average = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"]
    average += ["--trainer.callbacks.device", "cpu"]
    fit("--max_epochs", "4", "--lr", "0.05", *average)
    first = results("version_0")
    assert first["checkpoint"] == "final"
    final = RUNS / "version_0" / "checkpoints" / "final.ckpt"
    limit = ["--trainer.limit_test_batches", "2"]
    lit_cifar.test.main(["--ckpt_path", str(final), *limit, "--output", "again.json"])
    again = json.loads(Path("again.json").read_text())
    assert (again["confusion_matrix"], again["loss"]) == (first["confusion_matrix"], first["loss"])
    assert not torch.equal(
        *(read_checkpoint(final.with_name(name)).weights["net.fc3.weight"] for name in ("final.ckpt", "last.ckpt"))
    )


class HalveAtEnd(Callback):
    """Changes the weights after the last step, as weight averaging does."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for weight in pl_module.parameters():
                weight.mul_(0.5)


def test_a_finished_run_that_is_resumed_reports_its_final_state_again() -> None:
    fit("--max_epochs", "1", "--lr", "0.05", "--trainer.callbacks+=test_run.HalveAtEnd")
    first = results("version_0")
    assert first["checkpoint"] == "final"
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true"])
    again = {"seconds": 0, "when": 0, "peak_memory": 0}
    assert {**results("version_0"), **again} == {**first, **again}
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true", "--trainer.callbacks", "null", "--max_epochs", "2"])
    assert results("version_0")["checkpoint"] == "last", "that final state is not the end's any more"


def test_a_run_that_saves_nothing_names_no_state() -> None:
    fit("--max_epochs", "1", "--trainer.enable_checkpointing", "false")
    assert results("version_0")["checkpoint"] is None
    fit("--max_epochs", "1")
    assert results("version_1")["checkpoint"] == "last"
    assert not (RUNS / "version_1" / "checkpoints" / "final.ckpt").exists()


# ---- a run in pieces ----


def test_seconds_cover_the_whole_run_and_results_of_before_are_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--max_epochs", "1")
    first = results("version_0")
    assert first["seconds"]["pieces"] == [{key: first["seconds"][key] for key in first["seconds"] if key != "pieces"}]
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    seconds = results("version_0")["seconds"]
    assert seconds["pieces"][0] == first["seconds"]["pieces"][0]
    assert len(seconds["pieces"]) == 2
    for key in ("start", "first_step", "fit", "steps", "save", "test", "total"):
        assert seconds[key] == pytest.approx(sum(piece[key] for piece in seconds["pieces"]))
        assert all(piece[key] > 0 for piece in seconds["pieces"])
    assert json.loads((RUNS / "version_0" / "results-4.json").read_text()) == first, "nothing is lost"
    capsys.readouterr()
    runs.main(["--json"])
    assert json.loads(capsys.readouterr().out)[0]["seconds"] == seconds["total"]


class Break(Callback):
    """Ends a run, as `kill -9` would, in the third step of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise ZeroDivisionError


def test_a_killed_piece_counts_up_to_its_last_save_and_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--max_epochs", "1")
    run = RUNS / "version_0"
    first = results("version_0")
    longer = ["--max_epochs", "2", "--trainer.callbacks+=test_run.Break", "--checkpoint.every_n_train_steps", "1"]
    with pytest.raises(ZeroDivisionError):
        lit_cifar.fit.main(["--resume", "auto", *longer])
    assert not (run / "results.json").exists()
    capsys.readouterr()
    runs.main([])
    assert capsys.readouterr().out.splitlines()[1].endswith("no results: has a checkpoint")
    noted = read_checkpoint(run / "checkpoints" / "last.ckpt").chosen["seconds"]
    assert noted[0] == first["seconds"]["pieces"][0]
    assert 0 < noted[1]["steps"] + noted[1]["save"] < noted[1]["fit"] < noted[1]["total"]
    assert 0 < noted[1]["start"] < noted[1]["total"]
    assert 0 < noted[1]["first_step"] < noted[1]["fit"]
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true", "--trainer.callbacks", "null"])
    pieces = results("version_0")["seconds"]["pieces"]
    assert (len(pieces), pieces[:2]) == (3, noted)
    assert results("version_0")["seconds"]["total"] > sum(piece["total"] for piece in noted)


@pytest.mark.parametrize("noted", [None, "long", [3], [{"total": float("nan"), "fit": "x", "test": 10**400}]])
def test_a_checkpoint_without_seconds_or_with_odd_ones_resumes(noted: Any) -> None:
    fit("--max_epochs", "1")
    last = RUNS / "version_0" / "checkpoints" / "last.ckpt"
    (RUNS / "version_0" / "results.json").unlink()
    content = torch.load(last, weights_only=True)
    content["callbacks"]["Checkpoints"]["seconds"] = noted
    if noted is None:
        del content["callbacks"]["Checkpoints"]["seconds"]
    torch.save(content, last)
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    seconds = results("version_0")["seconds"]
    assert seconds["total"] == seconds["pieces"][-1]["total"]


def test_less_than_what_is_done_is_refused_and_as_much_is_tested_again() -> None:
    fit("--max_epochs", "2", "--checkpoint.every_n_train_steps", "3")
    run = RUNS / "version_0"
    before = contents(run)
    for limit, done in ((("--max_epochs", "1"), 2), (("--trainer.max_steps", "7"), 8), (("--max_epochs", "0"), 2)):
        message = error_of(lit_cifar.fit.main, ["--resume", "auto", *limit])
        assert f"{limit[0].replace('trainer.', '')} {limit[1]} is less than the {done} that" in message
    in_the_second_epoch = str(run / "checkpoints" / "last-1.ckpt")
    assert read_checkpoint(Path(in_the_second_epoch)).step == 6
    assert "is less than the 2" in error_of(lit_cifar.fit.main, ["--resume", in_the_second_epoch, "--max_epochs", "1"])
    assert contents(run) == before
    for limit in (("--max_epochs", "2"), ("--trainer.max_steps", "8")):
        lit_cifar.fit.main(["--resume", "auto", *limit])
        assert results("version_0")["num_steps"] == 8
    assert contents(run)["checkpoints/last.ckpt"] == before["checkpoints/last.ckpt"]


# ---- what cannot be written ----


def test_events_that_cannot_be_written_do_not_end_a_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(run)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.save()
    with disk_with_room_for(8000):
        logger.experiment.add_text("config", "x" * 20_000)
        logger.save()
        logger.finalize("success")
        logger.log_metrics({"train/loss": 2.0}, 2)  # begins another file
        logger.save()
    with disk_with_room_for(100):
        logger.finalize("success")
        logger.log_metrics({"train/loss": 3.0}, 3)
        logger.finalize("success")
    (line,) = capfd.readouterr().err.splitlines()
    assert f"TensorBoard's events in {run.folder} cannot be written (File too large): the run goes on" in line
    assert b"train/loss" in min(run.folder.glob("events.*")).read_bytes(), "what was written before is kept"
    assert not list(run.folder.glob(".*"))


@in_command()
def test_on_a_full_disk_no_checkpoint_is_proposed_that_does_not_exist(run: Run) -> None:
    for way_out in ("free space or fix the folder$", "the one before is whole: go on with --resume .*last.ckpt$"):
        with disk_with_room_for(100), pytest.raises(UserError, match=way_out):
            DurableCheckpointIO().save_checkpoint({"weight": torch.zeros(1000)}, run.checkpoint("last"))
        run.checkpoint("last").touch()


@in_command()
def test_before_the_first_save_weights_that_are_not_finite_propose_no_checkpoint(run: Run) -> None:
    checkpoints = Checkpoints()
    checkpoints.run = run
    state = {"state_dict": {"weight": torch.tensor([torch.nan])}}
    for way_out in ("start anew with a smaller --lr$", "go on from .*last.ckpt with --resume and a smaller --lr$"):
        with pytest.raises(UserError, match=way_out):
            checkpoints.on_save_checkpoint(Trainer(logger=False, accelerator="cpu"), LightningModule(), state)
        run.checkpoint("last").touch()


def test_a_name_that_is_too_long_is_one_line() -> None:
    assert "cannot be read (File name too long)" in error_of(fit, "--resume", "n" * 256)


def test_what_stands_in_the_way_of_results_is_found_before_training() -> None:
    fit("--max_epochs", "1")
    run = RUNS / "version_0"
    (run / "results.json").unlink()
    (run / "results.json").mkdir()
    message = error_of(lit_cifar.fit.main, ["--resume", "auto", "--max_epochs", "2"])
    assert "results.json cannot be written (it is a folder)" in message
    assert read_checkpoint(run / "checkpoints" / "last.ckpt").step == 4


def test_results_that_cannot_be_written_are_printed_and_tested_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, results: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(lit_cifar.fit, "write_results", full)
        message = error_of(fit, "--max_epochs", "1")
        assert message.endswith(f"then test again with --resume {RUNS / 'version_0'}")
        assert "Accuracy on the" in capsys.readouterr().out
        message = error_of(fit, "--max_epochs", "1", "--trainer.enable_checkpointing", "false")
        assert "--resume" not in message, "there is nothing to resume from"
    lit_cifar.fit.main(["--resume", str(RUNS / "version_0")])
    assert results("version_0")["num_steps"] == 4
