"""A report's figures are all read from one confusion matrix, so that no two can disagree."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lit_cifar.results import report as report_module
from lit_cifar.results.metrics import NUM_BINS, Calibration, Mistakes
from lit_cifar.results.report import Report, commit, print_report, versions, write_results

# rows true, columns predicted; no image of the class 'axolotl' was in the set
NOTHING = torch.zeros(NUM_BINS, dtype=torch.int64)
CALIBRATION = Calibration(NOTHING, NOTHING, NOTHING.double())
MISTAKES = Mistakes(
    torch.zeros(0, 3, 32, 32, dtype=torch.uint8), *(torch.zeros(0, dtype=torch.int64),) * 2, torch.zeros(0)
)
CONFUSION = torch.tensor([[9_000, 1_000, 0], [0, 0, 0], [2, 1, 4]])
REPORT = Report(CONFUSION, 0.5, ("cat", "axolotl", "dog"), CALIBRATION, MISTAKES)


def test_every_figure_is_that_of_the_matrix() -> None:
    assert (REPORT.num_images, REPORT.num_correct) == (10_007, 9_004)
    assert REPORT.accuracy == pytest.approx(9_004 / 10_007)
    assert REPORT.per_class_accuracy == pytest.approx({"cat": 0.9, "axolotl": 0, "dog": 4 / 7})


def test_results_and_scalars_say_the_same() -> None:
    results, scalars = REPORT.results(), REPORT.scalars()
    per_class = {f"accuracy/{name}": value for name, value in results["per_class_accuracy"].items()}
    own = {key: results[key] for key in ("loss", "accuracy", "calibration_error")}
    assert scalars == {**own, **per_class}
    matrix = results["confusion_matrix"]
    assert sum(map(sum, matrix)) == results["num_test"]
    assert sum(matrix[i][i] for i in range(3)) == pytest.approx(results["accuracy"] * results["num_test"])
    assert all(isinstance(count, int) for row in matrix for count in row)
    assert results["num_test"] == 10_007
    assert results["loss"] == 0.5


def test_no_image_at_all_gives_0_not_nan() -> None:
    empty = Report(torch.zeros(2, 2, dtype=torch.int64), 0.0, ("cat", "dog"), CALIBRATION, MISTAKES)
    assert set(empty.scalars().values()) == {0.0}
    assert not any(map(math.isnan, REPORT.scalars().values()))


def test_the_table_is_aligned_and_holds_each_classs_counts() -> None:
    headline, blank, *table, _, confused = REPORT.table().splitlines()
    assert headline == "Accuracy on the 10,007 test images: 89.98 %"
    assert blank == ""
    assert len({len(line) for line in table}) == 1, "columns end below one another"
    assert [line.replace("%", "").split() for line in table] == [
        ["class", "accuracy", "correct", "images"],
        ["cat", "90.00", "9,000", "10,000"],
        ["axolotl", "0.00", "0", "0"],
        ["dog", "57.14", "4", "7"],
    ]
    assert confused == "Most confused: dog → cat 29 %, dog → axolotl 14 %, cat → axolotl 10 %"


def test_pairs_are_told_by_their_share_of_the_true_class_and_never_one_that_did_not_happen() -> None:
    assert REPORT.confused_pairs(2) == [("dog", "cat", 2 / 7), ("dog", "axolotl", 1 / 7)]
    assert len(REPORT.confused_pairs(9)) == 3
    right = Report(torch.eye(2, dtype=torch.int64), 0.0, ("cat", "dog"), CALIBRATION, MISTAKES)
    assert right.confused_pairs() == []
    assert "confused" not in right.table()


def test_people_get_the_table_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT)
    assert capsys.readouterr().out.strip() == REPORT.table()


def test_results_are_json_that_any_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "version_0" / "results.json"
    write_results(path, {**REPORT.results(), "seed": 7})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert results == {**REPORT.results(), "seed": 7, "versions": versions(), "commit": commit()}
    assert results["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_the_checkouts_and_says_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set when a hook of git's runs the tests
        monkeypatch.delenv(name, raising=False)

    def git(*args: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    module = tmp_path / "lit_cifar" / "results" / "report.py"
    module.parent.mkdir(parents=True)
    module.write_text("before")
    monkeypatch.setattr(report_module, "__file__", str(module))
    assert commit() is None, "no checkout"
    git("init")
    assert commit() is None, "no commit yet"
    git("add", ".")
    git("commit", "--message=first")
    git("tag", "v1.0")
    assert commit() == git("rev-parse", "HEAD").strip()
    module.write_text("after")
    assert commit() == git("rev-parse", "HEAD").strip() + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() is None, "no git"
