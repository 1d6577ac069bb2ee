"""Lines about work under way, by level. Results are not printed here but where they are made, and errors in
errors.py. Lines are written with flags, as errors are."""

import logging
import os
import sys
from typing import Any, Literal, get_args

from lit_cifar.text import as_said, escaped

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(Level)
CHILD_VARIABLE = "LIT_CIFAR_RESUME"  # what fit has the processes that it starts on its node resume
_known: tuple[int, int] | None = None  # this process's rank and its rank on its node, once a Trainer has set them


def set_level(level: str) -> None:
    """Prints only lines of this level and above: 'debug', 'info', 'warning' or 'error'."""
    logging.getLogger("lit_cifar").setLevel(level.upper())


def is_said(level: Level) -> bool:
    """Whether lines of a level are printed; from 'info' on if no level was set."""
    return getattr(logging, level.upper()) >= (logging.getLogger("lit_cifar").level or logging.INFO)


def is_terminal(stream: Any) -> bool:
    """Whether people watch a standard stream: a script may have put an object in its place that can only be written to,
    or None."""
    return bool(getattr(stream, "isatty", bool)())


def set_rank(rank: int, local_rank: int) -> None:
    """Records this process's number among those that train together, and its number on its node."""
    global _known
    _known = rank, local_rank


def rank() -> int:
    """This process's number among those that train together; 0 if it trains alone.

    Before `set_rank` it is the launcher's number, if there is a launcher. Variables such as RANK alone prove nothing:
    a process that trains alone may have inherited them.
    """
    return _known[0] if _known else _launched("RANK", "SLURM_PROCID")


def local_rank() -> int:
    """This process's number among those on its node."""
    return _known[1] if _known else _launched("LOCAL_RANK", "SLURM_LOCALID")


def _launched(of_torchrun: str, of_slurm: str) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = of_torchrun
    elif "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        name = of_slurm
    elif CHILD_VARIABLE in os.environ:
        name = "LOCAL_RANK"
    else:
        return 0
    number = os.environ.get(name, "0")
    return int(number) if number.isdecimal() else 0  # process.py reports what is no number


def debug(line: str) -> None:
    """Prints how something is done on standard error, at level 'debug' only."""
    if is_said("debug"):
        print(f"lit_cifar: debug: {_who()}{escaped(as_said(line))}", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Prints what is going on on standard error; ranks other than the first name themselves."""
    if is_said("info"):
        print(f"{_who()}{escaped(as_said(line))}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Prints on standard error what somebody may have to act on."""
    if is_said("warning"):
        print(f"lit_cifar: warning: {_who()}{escaped(as_said(line))}", file=sys.stderr, flush=True)


def _who() -> str:
    return f"rank {rank()}: " if rank() else ""
