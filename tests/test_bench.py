"""bench measures what it says: its statistics against scipy's, its runs against the runs' own results."""

import json
import math
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats  # type: ignore[import-untyped]
import torch
from helpers import ROOT, Run, error_of
from pretend import pretended

from lit_cifar import bench, fit
from lit_cifar.errors import UserError

RECIPE = str(ROOT / "configs/tutorial.yaml")
QUICK = ["--dataset", "shapes", "--batch_size", "100", "--trainer.max_steps", "12"]


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


def test_a_warm_run_gives_what_a_run_of_its_own_gives(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["tutorial", "--runs", "2", "--warm", "true", *QUICK])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy, %"]["values"]
    assert len(values) == 2
    assert values[1] == pytest.approx(accuracy_of_a_run("--seed", "1"))
    assert not Path("lightning_logs/version_1").exists()  # bench keeps its runs to itself


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
    trainer: Any = SimpleNamespace(global_step=3)
    module: Any = SimpleNamespace(device=torch.device(kind))
    flags = ["tutorial", "--stage", "loader", "--runs", "1", "--dataset", "shapes", "--batch_size", "5000"]
    with pretended(kind):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda: waits.append(kind))
        bench._Stopwatch(3, 4).on_train_batch_end(trainer, module, {}, None, 0)
        assert waits == [kind]
        bench.main(flags)
        assert waits == [kind] * 3, "and the two repetitions, of which the first warms up"
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["device"].startswith(named)
        bench.main([*flags, "--accelerator", "cpu"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["device"].startswith("CPU")
    assert waits == [kind] * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs", "3"], "the recipe comes first: python -m lit_cifar.bench CONFIG "),
        (["nowhere.yaml"], "CONFIG nowhere.yaml is no file and no recipe; the recipes are resnet18, "),
        (["speedrum94"], "CONFIG speedrum94 is no file and no recipe: did you mean speedrun94"),
        ([os.devnull], f"CONFIG {os.devnull} is a pipe or device, and is read more than once: name a file"),
        ([RECIPE, "--runs", "0"], "--runs: expected a number from 1, got 0"),
        ([RECIPE, "--stage", "walk"], "--stage: expected one of fit, step, loader"),
        ([RECIPE, "--warm", "maybe"], "--warm: expected true or false"),
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
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("a run started"))
    assert re.search(message, error_of(bench.main, args))


def test_the_line_of_a_run_that_fails_is_passed_on() -> None:
    with pytest.raises(UserError, match=r"^--data.num_val 10000 takes 1000 of the 1000"):
        bench.main([RECIPE, "--data.num_val", "10000", "--dataset", "shapes"])


def test_runs_count_from_the_seed_in_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("seed_everything: 7\n")
    bench.main(["mine.yaml", "--runs", "2", "--warm", "True", *QUICK])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["seeds"], result["warm"]) == ([7, 8], True)


@pytest.mark.parametrize("args", [[], ["--help"], ["tutorial", "--runs", "2", "-h"]])
def test_help_is_printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(args)
    output = capsys.readouterr().out
    assert output.startswith("usage: python -m lit_cifar.bench CONFIG")
    for term in ("CONFIG", "--runs N", "--stage fit", "--stage step", "--stage loader", "--warm true", "speedrun94"):
        assert term in output
