"""The list of runs: true to each results.json, whatever is in it, and at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Run, error_of

import lit_cifar.fit
from lit_cifar import runs
from lit_cifar.errors import UserError
from lit_cifar.run.folder import read_identity
from lit_cifar.run.read import read_checkpoint
from lit_cifar.runs import SORT_KEYS

RESULTS: dict[str, Any] = {
    "recipe": "resnet18",
    "when": "2026-03-01T12:30:00+00:00",
    "dataset": "cifar10",
    "accuracy": 0.54321,
    "devices": 1,
    "seconds": {"total": 1234.5678},
}
SHORT = ["--dataset", "shapes", "--accelerator", "cpu", "--batch_size", "500", "--max_epochs", "1"]


def make_run(version: int, text: str | None = None, **changes: Any) -> Path:
    folder = Path(f"lightning_logs/version_{version}")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**RESULTS, **changes}) if text is None else text)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    runs.main(list(args))
    return capsys.readouterr().out.splitlines()


def as_json(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    runs.main([*args, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_run_is_listed_with_what_its_results_tell(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs/tutorial.yaml"
    Path("mine.yaml").write_text("model:\n  lr: 0.02\n")
    lit_cifar.fit.main(["--config", str(recipe), "--config=mine.yaml", *SHORT, "--trainer.max_steps", "2"])
    capsys.readouterr()
    results = json.loads(Path("lightning_logs/version_0/results.json").read_text())
    assert as_json(capsys) == [
        {
            "run": "lightning_logs/version_0",
            "version": 0,
            "recipe": "tutorial+mine",
            "dataset": "shapes",
            "accuracy": results["accuracy"],
            "num_test_left_out": 0,
            "seconds": results["seconds"]["total"],
            "devices": 1,
            "when": results["when"],
            "state": "done",
        }
    ]
    assert abs(runs._utc(results["when"]).timestamp() - time.time()) < 60


def test_a_resumed_run_keeps_its_recipe() -> None:
    Path("mine.yaml").write_text("model:\n  lr: 0.02\n")
    Path("more.yaml").write_text("trainer:\n  max_epochs: 2\n")
    for args in (["--config", "mine.yaml", *SHORT], ["--resume", "auto", "--config=more.yaml"]):
        lit_cifar.fit.main(args)
        results = json.loads(Path("lightning_logs/version_0/results.json").read_text())
        assert results["recipe"] == "mine"
    assert results["num_steps"] == 40


def test_no_config_is_the_tutorials_recipe() -> None:
    lit_cifar.fit.main([*SHORT, "--trainer.max_steps", "1"])
    assert json.loads(Path("lightning_logs/version_0/results.json").read_text())["recipe"] == "tutorial"


def test_people_get_aligned_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(2)
    make_run(10, recipe="\x1b[31mred\n", dataset="shapes", seconds={"total": 9.0}, when=None)
    assert listed(capsys) == [
        "version  recipe           data set  accuracy  seconds  devices  when (UTC)        state",
        "      2  resnet18         cifar10    54.32 %  1,234.6        1  2026-03-01 12:30  done",
        "     10  '\\x1b[31mred\\n'  shapes     54.32 %      9.0        1  -                 done",
    ]


def test_json_is_complete_and_the_same_from_every_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_run(0, accuracy=1 / 3)
    one = as_json(capsys)
    assert one[0]["accuracy"] == 1 / 3
    assert one[0]["seconds"] == 1234.5678
    assert as_json(capsys, ".") == one
    assert as_json(capsys, "lightning_logs") == one
    elsewhere = as_json(capsys, str(tmp_path))
    assert elsewhere == [{**one[0], "run": str(tmp_path / "lightning_logs/version_0")}]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("version", [0, 1, 2, 3]),
        ("accuracy", [1, 2, 0, 3]),
        ("seconds", [2, 0, 1, 3]),
        ("when", [2, 1, 0, 3]),
        ("recipe", [2, 0, 1, 3]),
    ],
)
def test_runs_are_sorted_and_those_without_the_value_come_last(
    key: str, order: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(0, accuracy=0.1, seconds={"total": 9})
    make_run(1, accuracy=0.9, seconds={"total": 10}, when="2026-03-01T13:30:00+00:00")
    make_run(2, accuracy=0.5, seconds={"total": 8}, when="2026-03-01T12:31:00-03:00", recipe="a")
    Path("lightning_logs/version_3").mkdir()
    assert [run["version"] for run in as_json(capsys, "--sort", key)] == order
    for other in SORT_KEYS:
        assert len(as_json(capsys, f"--sort={other}")) == 4


def test_an_accuracy_of_some_test_images_says_so_and_is_never_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*SHORT, "--trainer.max_steps", "1", "--trainer.limit_test_batches", "0.5"])
    results = Path("lightning_logs/version_0/results.json")
    assert json.loads(results.read_text())["num_test_left_out"] == 1000
    results.write_text(json.dumps({**json.loads(results.read_text()), "accuracy": 1.0}))
    make_run(1, accuracy=0.2)
    make_run(2, accuracy=0.3)
    make_run(3, accuracy=None)
    capsys.readouterr()
    first, second, third, last = listed(capsys, "--sort", "accuracy")[1:]
    assert [line.split()[0] for line in (first, second, third, last)] == ["2", "1", "0", "3"]
    assert third.endswith("done, 1,000 test images left out")
    assert [run["version"] for run in as_json(capsys, "--sort", "version")] == [0, 1, 2, 3]


def test_runs_without_results_tell_whether_they_can_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    for version in range(3):
        Path(f"lightning_logs/version_{version}/checkpoints").mkdir(parents=True)
    Path("lightning_logs/version_1/checkpoints/last.ckpt").touch()
    Path("lightning_logs/version_2/trial.json").write_text('{"trial": 3, "state": "pruned"}')
    Path("lightning_logs/sweeps").mkdir()
    assert [run["state"] for run in as_json(capsys)] == [
        "no results: no checkpoint",
        "no results: has a checkpoint",
        "no results: trial 3, pruned, no checkpoint",
    ]
    assert listed(capsys)[1].split() == [*"0------", "no", "results:", "no", "checkpoint"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[1, 2]",
        "[" * 100_000,
        "\x00",
        json.dumps({**RESULTS, "accuracy": "high"}),
        json.dumps({**RESULTS, "accuracy": float("nan")}),
        json.dumps({**RESULTS, "devices": True}),
        json.dumps({**RESULTS, "seconds": 3}),
        json.dumps({**RESULTS, "seconds": {"total": 10**400}}),
        json.dumps({**RESULTS, "when": "yesterday"}),
        json.dumps({**RESULTS, "when": "0001-01-01T00:00:00+14:00"}),
        json.dumps({**RESULTS, "recipe": ["a"]}),
        json.dumps({key: value for key, value in RESULTS.items() if key != "dataset"}),
    ],
    ids=lambda text: text[:40],
)
def test_damaged_results_are_told_on_their_own_row(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(0, text)
    make_run(1)
    damaged, whole = as_json(capsys)
    assert damaged["state"] == "results.json is damaged"
    assert damaged["accuracy"] is None
    assert (whole["state"], whole["accuracy"]) == ("done", 0.54321)
    assert len(listed(capsys)) == 3


def test_results_of_before_recipes_were_recorded_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(0, json.dumps({key: value for key, value in RESULTS.items() if key not in ("recipe", "when")}))
    (run,) = as_json(capsys)
    assert (run["recipe"], run["when"], run["accuracy"], run["state"]) == (None, None, 0.54321, "done")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["no runs in lightning_logs", "lit_cifar.fit"]),
        (["missing"], ["no runs in missing"]),
        (["notes.txt"], ["no runs in notes.txt"]),
        (["--sort", "acuracy"], ["--sort", "(did you mean accuracy?)"]),
        (["--jsn"], ["unknown flag --jsn", "(did you mean --json?)"]),
        (["--sort"], ["--sort", "expected one argument"]),
        (["a", "b"], ["unknown argument b"]),
    ],
)
def test_what_is_typed_wrong_ends_in_one_line(args: list[str], words: list[str]) -> None:
    Path("notes.txt").touch()
    with pytest.raises(UserError) as error:
        runs.main(args)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_no_runs_exit_with_2_and_one_line(run_command: Run) -> None:
    done = run_command("lit_cifar.runs")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("lit_cifar: error: no runs in lightning_logs")


def test_a_list_that_nobody_reads_to_its_end_is_no_error(tmp_path: Path) -> None:
    for version in range(2000):  # more than a pipe holds
        make_run(version)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m lit_cifar.runs | head -1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout.split()[0]) == (0, "", "version")


def test_listing_needs_no_torch() -> None:
    make_run(0)
    code = (
        "import sys; from lit_cifar import runs; runs.main([]); "
        "assert not {'torch', 'lightning', 'numpy', 'yaml'} & sys.modules.keys()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, check=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_is_no_file_or_endless_in_a_strangers_run_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, sparse, trial = (make_run(version) for version in range(3))
    (pipe / "results.json").unlink()
    os.mkfifo(pipe / "results.json")
    os.mkfifo(pipe / "run.json")
    os.truncate(sparse / "results.json", 2**40)
    (trial / "results.json").unlink()
    os.mkfifo(trial / "trial.json")
    assert [row["state"] for row in as_json(capsys)] == [
        "results.json cannot be read (it is no regular file)",
        "results.json cannot be read (it has 1,099,511,627,776 bytes)",
        "no results: trial.json is damaged, no checkpoint",
    ]
    assert read_identity(pipe) is None
    assert "cannot be read (it is no regular file)" in error_of(read_checkpoint, pipe / "run.json")
