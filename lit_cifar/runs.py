"""`python -m lit_cifar.runs`: lists runs by their results.json, which results/report.py writes. It imports no torch, so
that it starts at once."""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_cifar import errors
from lit_cifar.errors import FlagParser, UserError
from lit_cifar.files import local_path, read_whole
from lit_cifar.run.folder import RESULTS, RUNS, TRIAL, Run, run_version
from lit_cifar.text import columns, in_command, nearest, printable

HEADINGS = ("version", "recipe", "data set", "accuracy", "seconds", "devices", "when (UTC)", "state")
NUMBERS = (0, 3, 4, 5)  # columns aligned to the right
SORT_KEYS = ("version", "recipe", "dataset", "accuracy", "seconds", "devices", "when", "state")
# raised by what is no JSON, or JSON of another shape
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
BEST_FIRST = ("accuracy", "when")  # largest first; the others ascend


@dataclass(frozen=True)
class Row:
    """What is known of a run from its folder; None for what is not."""

    run: str
    version: int
    recipe: str | None = None
    dataset: str | None = None
    accuracy: float | None = None  # 0 to 1
    num_test_left_out: int = 0  # images of the test set that the accuracy is not of
    seconds: float | None = None  # of the whole process
    devices: int | None = None
    when: str | None = None  # the run's end, ISO 8601 in UTC
    state: str = ""

    def cells(self) -> tuple[str, ...]:
        """For people, one cell for each of HEADINGS."""
        return (
            str(self.version),
            _cell(self.recipe),
            _cell(self.dataset),
            "-" if self.accuracy is None else f"{100 * self.accuracy:.2f} %",
            "-" if self.seconds is None else f"{self.seconds:,.1f}",
            _cell(self.devices),
            "-" if self.when is None else f"{_utc(self.when):%Y-%m-%d %H:%M}",
            f"{self.state}, {left:,} test images left out" if (left := self.num_test_left_out) else self.state,
        )


@in_command()
def main(args: list[str]) -> None:
    """Prints the list; `args` is the command line without the program's name."""
    parser = FlagParser("python -m lit_cifar.runs", description="Lists runs with their accuracy.", allow_abbrev=False)
    parser.add_argument(
        "folder", nargs="?", default=str(RUNS), help=f"where the runs are, or the folder with {RUNS} (default: {RUNS})"
    )
    parser.add_argument(
        "--sort",
        metavar="KEY",
        default="version",
        help=f"one of {', '.join(SORT_KEYS)} (default: version); the best accuracy and the newest run come first",
    )
    parser.add_argument("--json", action="store_true", help="one JSON array with complete values")
    options = parser.parse_args(args)
    if options.sort not in SORT_KEYS:
        raise UserError(
            f"--sort: expected one of {', '.join(SORT_KEYS)}, got {options.sort}{nearest(options.sort, SORT_KEYS)}"
        )
    rows = sorted_rows([read_run(folder) for folder in find_runs(local_path(options.folder, "folder"))], options.sort)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(columns([HEADINGS, *(row.cells() for row in rows)], right=NUMBERS))


def find_runs(folder: Path) -> list[Path]:
    """The folders of the runs in a folder, or in its `lightning_logs`, by version.

    Raises:
        UserError: there are none.
    """
    for place in (folder, folder / RUNS):
        try:
            runs = [path for path in place.iterdir() if run_version(path) >= 0 and path.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {place} ({error.strerror})") from None
        if runs:
            return sorted(runs, key=run_version)
    raise UserError(f"no runs in {folder}: train one with python -m lit_cifar.fit, or name the folder with {RUNS}")


def read_run(folder: Path) -> Row:
    """What is known of a run from its folder; its state says so where results.json is damaged or not ours."""
    run = Run(folder=folder)
    without_results = Row(str(folder), run_version(folder))
    try:
        results = json.loads(read_whole(run.results))
        return replace(
            without_results,
            recipe=_text(results.get("recipe")),
            dataset=_text(results["dataset"]),
            accuracy=None if results["accuracy"] is None else _number(results["accuracy"]),
            num_test_left_out=int(_number(results.get("num_test_left_out", 0))),
            seconds=_number(results["seconds"]["total"]),
            devices=int(_number(results["devices"])),
            when=None if (when := _text(results.get("when"))) is None else _utc(when).isoformat(),
            # results.json is of the newest state: it is set aside before one is saved that is newer
            state="running again" if run.is_in_use else "done",
        )
    except FileNotFoundError:
        return replace(without_results, state=_state_without_results(run))
    except OSError as error:
        return replace(without_results, state=f"{RESULTS} cannot be read ({error.strerror})")
    except MALFORMED:
        return replace(without_results, state=f"{RESULTS} is damaged")


def _state_without_results(run: Run) -> str:
    has = "has a checkpoint" if run.checkpoint("last").is_file() else "no checkpoint"
    try:
        trial = json.loads(read_whole(run.trial))
        has = f"trial {int(trial['trial'])}, {printable(trial['state'])}, {has}"
    except FileNotFoundError:
        pass
    except (OSError, *MALFORMED):
        has = f"{TRIAL} is damaged, {has}"
    return f"{'running' if run.is_in_use else 'no results'}: {has}"


def sorted_rows(rows: list[Row], key: str) -> list[Row]:
    """Rows in the order of one of SORT_KEYS; those without that value come last, equal ones by version.

    Accuracies of a part of the test images cannot be compared, and come behind those of all.
    """
    known = [row for row in rows if getattr(row, key) is not None]
    unknown = [row for row in rows if getattr(row, key) is None]
    known.sort(key=lambda row: getattr(row, key), reverse=key in BEST_FIRST)
    if key == "accuracy":
        known.sort(key=lambda row: row.num_test_left_out > 0)
    return known + unknown


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError
    return value


def _utc(when: str) -> datetime:
    return datetime.fromisoformat(when).astimezone(UTC)


def _cell(value: str | int | None) -> str:
    return "-" if value is None else printable(str(value))


if __name__ == "__main__":
    errors.run(main, reader_gone=0)  # a list cut short, as by `head`, is no failure
