"""A run's folder belongs to one process at a time, until that process ends, in whatever way."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PYTHONPATH, SHORT, disk_with_room_for, error_of, results
from lightning.pytorch import Callback

import lit_cifar.fit
import lit_cifar.test
from lit_cifar import runs
from lit_cifar.cli.command import CLI
from lit_cifar.cli.study import open_study
from lit_cifar.errors import UserError
from lit_cifar.run import lock
from lit_cifar.run.folder import LOCK, RUNS, Run

FEW = [*SHORT, "--trainer.limit_train_batches", "4", "--trainer.limit_test_batches", "2"]
RUN = RUNS / "version_0"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, signals and named pipes")

HOLDER = """
import os, sys, time
from pathlib import Path
from lit_cifar.run.folder import Run
Run(folder=Path(sys.argv[1])).claim()
worker = os.fork()  # as a DataLoader's worker is
if worker:
    print(worker, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)


@pytest.fixture
def run() -> Iterator[Run]:
    """A run that this process has claimed."""
    run = Run.new(Path())
    run.claim()
    yield run
    run.unlock()


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in RUN.rglob("*") if path.is_file()}


# ---- the lock ----


@POSIX
def test_the_second_process_is_refused_until_the_first_is_killed_whose_workers_live_on() -> None:
    RUN.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(RUN)]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    worker = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as holder:
        try:
            assert holder.stdout is not None
            worker = int(holder.stdout.readline())
            message = error_of(Run(folder=RUN).claim)
            assert f"{RUN} is in use by process {holder.pid} on " in message
            assert str(RUN / LOCK) in message, "the way out if its machine was lost"
            assert Run(folder=RUN).is_in_use
            holder.kill()
            holder.wait()
            os.kill(worker, 0)  # is there
            second = Run(folder=RUN)
            second.claim()
            second.unlock()
        finally:
            holder.kill()
            if worker:
                os.kill(worker, signal.SIGKILL)
    assert os.listdir(RUN) == []


def test_a_run_of_this_process_waits_for_one_that_is_on_its_way_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 60)
    other = Run(folder=run.folder)
    thread = threading.Timer(0.2, run.unlock)
    thread.start()
    other.claim()
    thread.join()
    assert (run.folder / LOCK).is_file(), "the other's"
    run.unlock()
    assert (run.folder / LOCK).is_file()
    other.unlock()
    assert not (run.folder / LOCK).exists()


def test_who_removes_the_file_may_go_on_and_the_first_leaves_it_alone(run: Run) -> None:
    (run.folder / LOCK).unlink()  # as the message says, for a machine that was lost
    other = Run(folder=run.folder)
    other.claim()
    run.unlock()
    assert "is in use" in error_of(Run(folder=run.folder).claim)
    other.unlock()


@POSIX
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EIO])
def test_where_there_are_no_locks_a_line_says_that_nothing_can_tell(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    RUN.mkdir(parents=True)
    (RUN / LOCK).write_text('{"host": "node7", "pid": 12, "since": "2026-01-01T00:00:00+00:00"}')
    run = Run(folder=RUN)
    assert not run.is_in_use
    run.claim()
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no file locks, so nothing can tell whether another process trains this run; process 12 on" in line
    run.unlock()
    assert os.listdir(RUN) == []


@pytest.mark.parametrize("host", ["node7", "\x1b[31m", None])
def test_a_file_that_another_machine_left_is_worth_a_line(host: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    RUN.mkdir(parents=True)
    host_text = lock.socket.gethostname() if host is None else host
    record = {"host": host_text, "pid": 12, "since": "2026-01-01T00:00:00+00:00"}
    (RUN / LOCK).write_text(lock.json.dumps(record))
    run = Run(folder=RUN)
    run.claim()
    run.unlock()
    said = capsys.readouterr().err
    assert said.count("\n") == (0 if host is None else 1), "here the lock itself tells"
    assert host is None or "which did not end in order: make sure that it is gone" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("content", ["", "[" * 5000, "null", '{"pid": "a"}', '{"host": 1, "pid": 1e999, "since": 0}'])
def test_whatever_is_in_the_file_is_no_obstacle(content: str) -> None:
    RUN.mkdir(parents=True)
    (RUN / LOCK).write_text(content)
    run = Run(folder=RUN)
    run.claim()
    assert f"process {os.getpid()} on " in error_of(Run(folder=RUN).claim)
    run.unlock()


@POSIX
@pytest.mark.parametrize("in_the_way", ["link", "pipe", "folder"])
def test_what_is_no_file_is_neither_followed_nor_waited_for(in_the_way: str) -> None:
    RUN.mkdir(parents=True)
    Path("precious").write_text("kept")
    if in_the_way == "link":
        (RUN / LOCK).symlink_to(Path("precious").resolve())
    elif in_the_way == "pipe":
        os.mkfifo(RUN / LOCK)
    else:
        (RUN / LOCK).mkdir()
    assert str(RUN / LOCK) in error_of(Run(folder=RUN).claim)
    assert Path("precious").read_text() == "kept"
    assert not Run(folder=RUN).is_in_use


def test_a_full_disk_is_one_line_and_leaves_no_lock() -> None:
    RUN.mkdir(parents=True)
    run = Run(folder=RUN)
    with disk_with_room_for(0):
        assert "run.lock cannot be written" in error_of(run.claim)
    assert os.listdir(RUN) == []
    run.claim()
    run.unlock()


# ---- what commands make of it ----


class Break(Callback):
    """Ends a run as a bug would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise ZeroDivisionError


def test_a_run_in_use_is_not_resumed_but_tested_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*FEW, "--max_epochs", "1"])
    assert LOCK not in os.listdir(RUN), "after an orderly end it is gone"
    first = Run(folder=RUN)
    first.claim()
    before = contents()
    message = error_of(lit_cifar.fit.main, ["--resume", "auto", "--max_epochs", "2"])
    assert f"is in use by process {os.getpid()} on " in message
    assert contents() == before
    lit_cifar.test.main(["--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--trainer.limit_test_batches", "2"])
    capsys.readouterr()
    runs.main([])
    assert capsys.readouterr().out.rstrip().endswith("running again, 1,000 test images left out")
    first.results.unlink()
    runs.main([])
    assert capsys.readouterr().out.rstrip().endswith("running: has a checkpoint")
    first.unlock()
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    assert results("version_0")["num_steps"] == 8


def test_a_run_that_breaks_gives_the_lock_back_and_a_new_one_has_it_too() -> None:
    with pytest.raises(ZeroDivisionError):
        lit_cifar.fit.main(
            [*FEW, "--checkpoint.every_n_train_steps", "1", "--trainer.callbacks+=test_lock.Break", "--max_epochs", "1"]
        )
    assert LOCK not in os.listdir(RUN)
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true", "--trainer.callbacks", "null"])
    assert results("version_0")["num_steps"] == 4


def test_what_another_process_saved_until_then_is_what_the_run_goes_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    lit_cifar.fit.main([*FEW, "--max_epochs", "2", "--checkpoint.epoch_end_seconds", "0"])
    last = RUN / "checkpoints" / "last.ckpt"
    newer = last.read_bytes()
    last.write_bytes(last.with_name("last-1.ckpt").read_bytes())
    begin, steps = CLI.begin, []

    def begin_late(command: CLI) -> None:  # the other process saved once more while this one read its data
        assert command.state is not None
        steps.append(command.state.step)
        last.write_bytes(newer)
        begin(command)
        steps.append(command.trainer.loggers[0]._kwargs["purge_step"] - 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(CLI, "begin", begin_late)
    lit_cifar.fit.main(["--resume", str(last), "--max_epochs", "2"])
    assert steps == [4, 8], "TensorBoard would forget what the other one wrote"


def test_a_sweep_finds_what_is_in_its_way_before_the_first_trial() -> None:
    pytest.importorskip("optuna")
    Path("trials.lock").write_text("precious")
    for storage, reason in (("trials.lock", "is the name of a lock"), ("n" * 250 + ".db", "File name too long")):
        with pytest.raises(UserError, match=reason), open_study(Path(storage)):
            pass
    assert Path("trials.lock").read_text() == "precious"
    assert os.listdir() == ["trials.lock"]
