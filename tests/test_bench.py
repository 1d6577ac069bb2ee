"""bench measures what it says: its statistics against scipy's, its runs against the runs' own results."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.stats  # type: ignore[import-untyped]
import torch
from helpers import ROOT, Run, error_of, followed, make_tree, results, weights
from pretend import pretended

from lit_cifar import bench, fit, seeds
from lit_cifar.errors import UserError
from lit_cifar.model.module import LitClassifier
from lit_cifar.run import folder, lock
from lit_cifar.run.stop import STOPPED, Stopped

RECIPE = str(ROOT / "configs/tutorial.yaml")
QUICK = ["--dataset", "shapes", "--batch_size", "100", "--trainer.max_steps", "12"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


@pytest.mark.parametrize("n", [2, 3, 10, 31])
def test_the_interval_is_students(n: int) -> None:
    values = [90 + math.sin(i) for i in range(n)]
    found = bench.summary(values)
    low, high = scipy.stats.t.interval(0.95, n - 1, scipy.stats.tmean(values), scipy.stats.sem(values))
    assert found["n"] == n
    assert found["mean"] == pytest.approx((low + high) / 2)
    assert found["ci95"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert found["std"] == pytest.approx(scipy.stats.tstd(values))


def test_one_value_has_no_spread() -> None:
    assert bench.summary([3.0]) == {"mean": 3.0, "std": None, "n": 1, "ci95": None}
    assert "-" in bench.table({"seconds": ([3.0], 1)})


@pytest.mark.slow
def test_each_run_is_a_process_with_a_seed_of_its_own(run_command: Run) -> None:
    done = run_command("lit_cifar.bench", RECIPE, "--runs", 2, *QUICK, "--seed", 5, "--model.tta", "mirror")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seeds"] == [5, 6]
    assert result["dataset"] == "shapes"
    values = result["accuracy, %"]["values"]
    assert len(set(values)) == 2
    assert result["accuracy, %"]["mean"] == pytest.approx(sum(values) / 2)
    assert result["accuracy without TTA, %"]["n"] == 2
    fit, total = result["fit, s"]["mean"], result["whole process, s"]["mean"]
    assert 0 < result["of it first step (warm-up, compile), s"]["mean"] < fit < total
    assert 0 < result["of it training steps, s"]["mean"] < fit
    assert result["start to first step, s"]["mean"] < total
    assert 100 < result["peak resident memory, MB"]["mean"] < 5000
    assert {"device", "versions", "commit"} <= result.keys()
    assert values[1] == pytest.approx(accuracy_of_a_run("--seed", "6", "--model.tta", "mirror"))


def accuracy_of_a_run(*flags: str) -> float:
    """In per cent, of lit_cifar.fit alone."""
    fit.main(["--config", RECIPE, *QUICK, *flags])
    return 100 * json.loads(Path("lightning_logs/version_0/results.json").read_text())["accuracy"]


def test_a_warm_run_gives_what_a_run_of_its_own_gives_and_seeds_count_from_that_in_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.yaml").write_text("seed_everything: 7\n")
    bench.main(["mine.yaml", "--runs", "2", "--warm", "True", *QUICK])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["seeds"], result["warm"]) == ([7, 8], True)
    values = result["accuracy, %"]["values"]
    assert len(values) == 2
    assert values[1] == pytest.approx(accuracy_of_a_run("--seed", "8"))
    assert not Path("lightning_logs/version_1").exists()  # bench keeps its runs to itself


# ---- runs that are kept ----


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The runs of fit that bench makes, in this process here."""
    made: list[list[str]] = []

    def fit_here(args: list[str]) -> None:
        made.append(args)
        seeds.fit_here(args)

    monkeypatch.setattr(bench, "fit_alone", fit_here)
    return made


def fit_in(place: str, seed: int) -> None:
    fit.main(["--config", RECIPE, *QUICK, "--seed", str(seed), "--trainer.default_root_dir", f"{place}/seed_{seed}"])


def stopped_fit_in(place: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `fit_in`, stopped by a signal in the middle."""
    step = LitClassifier.training_step

    def stop(module: LitClassifier, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitClassifier, "training_step", stop)
        with pytest.raises(Stopped):
            fit_in(place, seed)


def kept(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON of bench's last line, and all it printed."""
    capsys.readouterr()
    bench.main([RECIPE, "--keep", "kept", *QUICK, *args])
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


@posix
def test_finished_runs_count_others_go_on_and_missing_ones_begin(
    fits: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_in("kept", 5)
    stopped_fit_in("kept", 6, monkeypatch)
    fit_in("whole", 6)
    found, printed = kept("--runs", "3", "--seed", "5", capsys=capsys)
    assert [[part for part in args if part.startswith("kept/")] for args in fits] == [
        ["kept/seed_6", "kept/seed_6/lightning_logs/version_0"],
        ["kept/seed_7"],
    ]
    assert found["seeds"] == [5, 6, 7]
    assert [found[name]["n"] for name in ("accuracy, %", "fit, s", "peak resident memory, MB")] == [3, 2, 2]
    assert "those of the 2 of 3 runs that were never resumed" in printed

    runs = [Path(place, "seed_6/lightning_logs/version_0").absolute() for place in ("kept", "whole")]
    one, other = map(weights, runs)
    assert all(torch.equal(one[name], other[name]) for name in other)
    accuracies = [results(run)["accuracy"] for run in runs]
    assert found["accuracy, %"]["values"][1] == 100 * accuracies[0] == 100 * accuracies[1]

    again, _ = kept("--runs", "3", "--seed", "5", capsys=capsys)
    assert len(fits) == 2
    assert again["accuracy, %"] == found["accuracy, %"]


def test_a_damaged_result_is_measured_again(fits: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    fit_in("kept", 0)
    path = Path("kept/seed_0/lightning_logs/version_0/results.json")
    accuracy = json.loads(path.read_text())["accuracy"]
    path.write_text('{"accuracy": 0.')
    found, _ = kept("--runs", "1", capsys=capsys)
    assert "--resume" in fits[0]
    assert found["accuracy, %"]["values"] == [100 * accuracy]
    assert "fit, s" not in found, "its process only tested it"


def test_runs_with_other_settings_are_refused_in_a_line_that_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fit_in("kept", 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a run started"))
    run = Path("kept/seed_0/lightning_logs/version_0")
    for recipe, flags, change in (
        (RECIPE, ["--precision", "bf16-mixed"], "--trainer.precision was nothing and is now bf16-mixed;"),
        (RECIPE, ["--batch_size", "50"], "--data.batch_size was 100 and is now 50;"),
        (
            RECIPE,
            ["--lr", "0.5", "--model.schedule", "linear"],
            "--model.lr was 0.001 and is now 0.5; --model.schedule",
        ),
        (RECIPE, ["--max_epochs", "9"], "--trainer.max_epochs was 2 and is now 9;"),
        (
            RECIPE,
            ["--model.net", "SpeedNet"],
            "--model.net was lit_cifar.nets.Net and is now lit_cifar.nets.SpeedNet;",
        ),
        (
            "speedrun94",
            [],
            "--data.augment.crop was 0 and is now 2; --data.augment.flip was none and is now alternating;",
        ),
    ):
        line = error_of(bench.main, [recipe, "--keep", "kept", *QUICK, *flags])
        assert line.startswith(f"{run} has other settings: {change}"), line
        assert line.endswith("; name another folder")
    Path("kept/seed_0").rename("kept/seed_1")
    line = error_of(bench.main, [RECIPE, "--keep", "kept", *QUICK])
    assert "--seed_everything was 0 and is now 1" in line


def test_the_number_of_classes_is_the_datas_and_another_version_may_have_other_settings(
    fits: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = str(make_tree(Path("tree"), ("bird", "cat", "dog")))
    args = [RECIPE, "--runs", "1", "--keep", "kept", "--data_dir", tree, "--batch_size", "4", "--max_epochs", "1"]
    bench.main(args)
    config = Path("kept/seed_0/lightning_logs/version_0/config.yaml")
    assert "num_classes: 3" in config.read_text()
    config.write_text(config.read_text().replace("  num_val: 0\n", "  of_another_version: 1\n"))
    bench.main(args)
    assert len(fits) == 1


def test_a_run_that_another_process_trains_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.1)
    Path("kept/seed_1/lightning_logs/version_0").mkdir(parents=True)
    theirs = folder.Run(folder=Path("kept/seed_1/lightning_logs/version_0"))
    theirs.claim()
    try:
        assert "kept/seed_1/lightning_logs/version_0 is in use by" in error_of(
            bench.main, [RECIPE, "--keep", "kept", "--runs", "2", *QUICK]
        )
    finally:
        theirs.unlock()
    assert not Path("kept/seed_0").exists()


@posix
def test_a_signal_lets_the_run_save_and_the_command_that_goes_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for fit has bench stopped by a signal, and saves when it is told to stop."""
    stand_in = tmp_path / "fit"
    wait = "until [ -e waited_for ]; do sleep 0.1; done"
    saves = "trap 'echo saved > saved; exit 75' TERM"
    stand_in.write_text(f"#!/bin/sh\n{saves}\n{wait}\nkill -TERM {os.getpid()}\nwhile :; do sleep 0.1; done\n")
    stand_in.chmod(0o755)

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def communicate(self, *args: Any, **options: Any) -> Any:
            Path("waited_for").touch()
            return super().communicate(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(Stopped) as stopped:
        bench.main([RECIPE, "--keep", "my runs", "--runs", "1", *QUICK])
    assert str(stopped.value) == (
        f"stopped by SIGTERM; go on with python -m lit_cifar.bench {RECIPE} --keep 'my runs' --runs 1 {' '.join(QUICK)}"
    )
    assert Path("saved").read_text() == "saved\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@posix
@pytest.mark.slow
def test_a_bench_that_is_stopped_goes_on_to_the_same_end(run_command: Run) -> None:
    args = [
        RECIPE,
        "--runs",
        1,
        *QUICK[:-1],
        3000,
        "--max_epochs",
        30,
        "--checkpoint.every_n_train_steps",
        50,
        "--keep",
    ]
    with followed("lit_cifar.bench", *args, "kept") as process:
        until, state = time.monotonic() + 200, Path("kept/seed_0/lightning_logs/version_0/checkpoints/last.ckpt")
        while not state.is_file() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == STOPPED, errors
        assert "lit_cifar: stopped by SIGTERM; go on with python -m lit_cifar.bench" in errors
    for place in ("kept", "whole"):
        done = run_command("lit_cifar.bench", *args, place)
        assert done.returncode == 0, done.stderr
    one, other = (weights(Path(place, "seed_0/lightning_logs/version_0").absolute()) for place in ("kept", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    pieces = results(Path("kept/seed_0/lightning_logs/version_0").absolute())["seconds"]["pieces"]
    assert len(pieces) == 2


# ---- one stage ----


def test_the_step_is_measured_beside_barebones(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([RECIPE, "--stage", "step", "--runs", "2", *QUICK])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_steps"] == 6
    for ratio, ours, bare in zip(
        *(result[name]["values"] for name in ("ratio", "as configured", "barebones")), strict=True
    ):
        assert ratio == pytest.approx(ours / bare)


def test_the_loader_alone_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS_A_REPETITION", 0.2)
    bench.main(["tutorial", "--stage", "loader", "--runs", "2", "--dataset", "shapes"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["config"] == "tutorial"
    assert len(result["images/s"]["values"]) == 2
    assert min(result["images/s"]["values"]) > 1000


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize(("kind", "named"), [("mps", "Apple GPU (mps)"), ("cuda", "1 x Pretended H100")])
def test_a_gpu_is_waited_for_and_named(
    kind: str, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SECONDS_A_REPETITION", 0.01)
    waits: list[str] = []
    flags = ["tutorial", "--stage", "loader", "--runs", "1", "--dataset", "shapes", "--batch_size", "5000"]
    with pretended(kind):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda: waits.append(kind))
        bench.main(flags)
        assert waits == [kind] * 2, "the two repetitions, of which the first warms up"
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["device"].startswith(named)
        bench.main([*flags, "--accelerator", "cpu"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["device"].startswith("CPU")
    assert waits == [kind] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs", "3"], "the recipe comes first: python -m lit_cifar.bench CONFIG "),
        (["nowhere.yaml"], "CONFIG nowhere.yaml is no file and no recipe; the recipes are resnet18, "),
        (["speedrum94"], r"CONFIG speedrum94 is no file and no recipe \(did you mean speedrun94\?\)"),
        ([os.devnull], f"CONFIG {os.devnull} is a pipe or device, and is read more than once: name a file"),
        ([RECIPE, "--runs", "0"], "--runs: expected a number from 1, got 0"),
        ([RECIPE, "--stage", "walk"], "--stage: expected one of fit, step, loader"),
        ([RECIPE, "--warm", "maybe"], "--warm: expected true or false"),
        ([RECIPE, "--stage", "step", "--keep", "kept"], "^--keep and --warm are for --stage fit: leave them out$"),
        (
            [RECIPE, "--keep", "kept", "--trainer.callbacks+=LearningRateFinder"],
            "--keep knows its runs by their settings, and LearningRateFinder",
        ),
        ([RECIPE, "--keep", "s3://kept"], "--keep s3://kept: s3:// is not supported"),
        ([RECIPE, "--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run: bench measures the accuracy of tests"),
        (
            [RECIPE, "--stage", "step", "--trainer.max_steps", "1"],
            "--stage step needs 2 or more",
        ),
        ([RECIPE, "--seed", "abc"], "--seed: expected int, got abc"),
        ([RECIPE, "--trainer.max_steps", "abc"], "--trainer.max_steps: expected int, got abc"),
        ([RECIPE, "--batch_size", "0"], "--batch_size: expected a number above 0, got 0"),
        (["s3://recipes/fast.yaml"], "CONFIG s3://recipes/fast.yaml: s3:// is not supported"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_run_starts(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a run started"))
    assert re.search(message, error_of(bench.main, args))


@pytest.mark.slow
def test_the_line_of_a_run_that_fails_is_passed_on() -> None:
    with pytest.raises(UserError, match=r"^--data.num_val 10000 takes 1000 of the 1000"):
        bench.main([RECIPE, "--data.num_val", "10000", "--dataset", "shapes"])


@pytest.mark.parametrize("args", [[], ["--help"], ["tutorial", "--runs", "2", "-h"]])
def test_help_is_printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(args)
    output = capsys.readouterr().out
    assert output.startswith("usage: python -m lit_cifar.bench CONFIG")
    for term in (
        "CONFIG",
        "--runs N",
        "--stage fit",
        "--stage step",
        "--stage loader",
        "--warm true",
        "--keep FOLDER",
        "speedrun94",
    ):
        assert term in output
