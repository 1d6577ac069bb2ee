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
    assert REPORT.worst_cells(2) == [(2, 0, 2, 2 / 7), (2, 1, 1, 1 / 7)]
    assert len(REPORT.worst_cells(9)) == 3
    right = Report(torch.eye(2, dtype=torch.int64), 0.0, ("cat", "dog"), CALIBRATION, MISTAKES)
    assert right.worst_cells(5) == []
    assert "confused" not in right.table()


def diagonal(num_classes: int, sparse: bool = False) -> Report:
    """Class i has i + 1 images, of which one is right."""
    confusion = torch.eye(num_classes, dtype=torch.int64)
    confusion[torch.arange(num_classes), (torch.arange(num_classes) + 1) % num_classes] += torch.arange(num_classes)
    names = tuple(f"class {label}" for label in range(num_classes))
    return Report(confusion.to_sparse() if sparse else confusion, 0.5, names, CALIBRATION, MISTAKES)


def test_a_table_of_many_classes_has_the_worst_and_the_best() -> None:
    assert len(diagonal(100).table().splitlines()) == 3 + 100 + 2
    lines = diagonal(1000).table().splitlines()
    listed = [line.split()[:2] for line in lines if line.startswith("class ") and "%" in line]
    assert [int(number) for _, number in listed] == [*range(999, 989, -1), 4, 3, 2, 1, 0]
    assert "The worst and the best of 1,000 classes; per_class_accuracy in the results has all" in lines
    assert len(diagonal(100).scalars()) == 103
    assert diagonal(101).scalars().keys() == {"loss", "accuracy", "calibration_error"}
    assert len(diagonal(1000).results()["per_class_accuracy"]) == 1000


def test_a_sparse_matrix_says_what_a_dense_one_says(tmp_path: Path) -> None:
    dense, sparse = diagonal(30), diagonal(30, sparse=True)
    assert sparse.table() == dense.table()
    assert sparse.scalars() == dense.scalars()
    ours, theirs = sparse.results(), dense.results()
    matrix, counts = theirs.pop("confusion_matrix"), ours.pop("confusion_counts")
    assert ours == {**theirs, "confusion_matrix": None}
    assert {(row, column): count for row, column, count in counts} == {
        (row, column): count for row, counts in enumerate(matrix) for column, count in enumerate(counts) if count
    }
    for report in (dense, sparse):
        write_results(tmp_path / "results.json", report.results())
        text = (tmp_path / "results.json").read_text()
        assert len(text.splitlines()) < 160, "a line for each row"
        assert json.loads(text) == {**report.results(), "versions": versions(), "commit": commit()}


def test_images_whose_logits_are_not_finite_count_as_wrong_and_are_said() -> None:
    confusion = torch.tensor([[3, 1, 6], [0, 9, 1]])
    report = Report(confusion, math.nan, ("cat", "dog"), CALIBRATION, MISTAKES)
    assert (report.num_images, report.num_not_finite, report.accuracy) == (20, 7, 0.6)
    assert report.per_class_accuracy == {"cat": 0.3, "dog": 0.9}
    assert report.worst_cells(5) == [(0, 1, 1, 0.1)]
    results = report.results()
    assert (results["confusion_matrix"], results["num_not_finite"], results["loss"]) == ([[3, 1], [0, 9]], 7, None)
    (warning,) = report.warnings()
    assert warning.startswith("the logits of 7 of 20 images are not finite: they count as wrong")
    ruled_out = Report(confusion[:, :2], math.inf, ("cat", "dog"), CALIBRATION, MISTAKES)
    assert ruled_out.results()["loss"] is None
    assert "minus infinity" in ruled_out.warnings()[0]
    assert REPORT.warnings() == REPORT.warnings(REPORT.num_images) == []


def test_the_report_of_no_image_has_null_for_what_was_not_measured() -> None:
    report = Report.of_nothing(("cat", "dog"))
    results = report.results()
    assert (results["num_test"], results["num_not_finite"]) == (0, 0)
    assert results["confusion_matrix"] == [[0, 0], [0, 0]]
    for key in ("accuracy", "per_class_accuracy", "loss", "calibration_error"):
        assert results[key] is None
    assert report.table().isprintable(), "one line"
    assert report.warnings(2000) == []


def test_some_of_the_images_are_said_to_be_some(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT, num_all=20_000)
    said = capsys.readouterr()
    assert said.out.strip() == REPORT.table()
    assert said.err.startswith("lit_cifar: warning: 10,007 of 20,000 test images were looked at")


def test_a_table_is_printable_whatever_the_names() -> None:
    names = ("\x1b[2Jcat", "new\nline", "dog")
    report = Report(CONFUSION, 0.5, names, CALIBRATION, MISTAKES)
    assert all(line.isprintable() for line in report.table().splitlines())
    assert len(report.table().splitlines()) == len(REPORT.table().splitlines())
    assert all(name.isprintable() for name in report.scalars())
    assert tuple(report.results()["per_class_accuracy"]) == names


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
