"""`python -m lit_cifar.runs`: lists runs by what their results.json tells. It imports no torch, so that it starts at
once; what results mean is decided where they are written."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from lit_cifar import errors
from lit_cifar.errors import UserError
from lit_cifar.run.folder import RESULTS, RUNS, TRIAL, run_version
from lit_cifar.text import columns, nearest, printable

HEADINGS = ("version", "recipe", "data set", "accuracy", "seconds", "devices", "when (UTC)", "state")
NUMBERS = (0, 3, 4, 5)  # columns aligned to the right
SORT_KEYS = ("version", "recipe", "dataset", "accuracy", "seconds", "devices", "when", "state")
# what reading JSON of any other shape, or none, leads to
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
BEST_FIRST = ("accuracy", "when")  # largest first; the others ascend


@dataclass(frozen=True)
class Row:
    """What a run's folder tells; None for what it does not."""

    run: str
    version: int
    recipe: str | None = None
    dataset: str | None = None
    accuracy: float | None = None  # 0 to 1
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
            self.state,
        )


class Parser(argparse.ArgumentParser):
    """Argparse with errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(args: list[str]) -> None:
    """Lists; `args` is the command line without the program's name."""
    parser = Parser(prog="python -m lit_cifar.runs", description="Lists runs with their accuracy.", allow_abbrev=False)
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
    options, unknown = parser.parse_known_args(args)
    if unknown:
        flags = ("--sort", "--json", "--help")
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}; see --help")
    if options.sort not in SORT_KEYS:
        raise UserError(
            f"--sort: expected one of {', '.join(SORT_KEYS)}, got {options.sort}{nearest(options.sort, SORT_KEYS)}"
        )
    rows = sorted_rows([read_run(run) for run in find_runs(Path(options.folder))], options.sort)
    if options.json:
        output = json.dumps([asdict(row) for row in rows], indent=2)
    else:
        output = columns([HEADINGS, *(row.cells() for row in rows)], right=NUMBERS)
    try:
        print(output, flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder, or in its `lightning_logs`, by version.

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


def read_run(run: Path) -> Row:
    """What a run's folder tells; a results.json that is damaged, or somebody else's, is told as the run's state."""
    try:
        results = json.loads((run / RESULTS).read_bytes())
        row = Row(
            run=str(run),
            version=run_version(run),
            recipe=_text(results.get("recipe")),
            dataset=_text(results["dataset"]),
            accuracy=_number(results["accuracy"]),
            seconds=_number(results["seconds"]["total"]),
            devices=int(_number(results["devices"])),
            when=None if (when := _text(results.get("when"))) is None else _utc(when).isoformat(),
            state="done",
        )
    except FileNotFoundError:
        return Row(str(run), run_version(run), state=_state_without_results(run))
    except OSError as error:
        return Row(str(run), run_version(run), state=f"{RESULTS} cannot be read ({error.strerror})")
    except MALFORMED:
        return Row(str(run), run_version(run), state=f"{RESULTS} is damaged")
    return row


def _state_without_results(run: Path) -> str:
    has = "has a checkpoint" if (run / "checkpoints" / "last.ckpt").is_file() else "no checkpoint"
    try:
        trial = json.loads((run / TRIAL).read_bytes())
        has = f"trial {int(trial['trial'])}, {printable(trial['state'])}, {has}"
    except FileNotFoundError:
        pass
    except (OSError, *MALFORMED):
        has = f"{TRIAL} is damaged, {has}"
    return f"no results: {has}"


def sorted_rows(rows: list[Row], key: str) -> list[Row]:
    """Rows in the order of one of SORT_KEYS; those without that value come last, equal ones by version."""
    known = [row for row in rows if getattr(row, key) is not None]
    unknown = [row for row in rows if getattr(row, key) is None]
    return sorted(known, key=lambda row: getattr(row, key), reverse=key in BEST_FIRST) + unknown


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError
    return value


def _utc(when: str) -> datetime:
    return datetime.fromisoformat(when).astimezone(timezone.utc)


def _cell(value: str | int | None) -> str:
    return "-" if value is None else printable(str(value))


if __name__ == "__main__":
    errors.run(main)
