"""Lines about work under way, by level: what goes on, and warnings. What is said, and when, is its callers'; results
are always printed, by who has them, and so are errors, by errors."""

import logging
import os
import sys
from typing import Literal, get_args

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(Level)
CHILD_VARIABLE = "LIT_CIFAR_RESUME"  # that fit gives the processes which it starts on its node
_known: tuple[int, int] | None = None  # this process's rank and that on its node, once a Trainer has said them


def set_level(level: str) -> None:
    """Says only what is at least so urgent: 'debug', 'info', 'warning' or 'error'."""
    logging.getLogger("lit_cifar").setLevel(level.upper())


def is_said(level: Level) -> bool:
    """Whether lines of a level are wanted; where nobody has set one, those of 'info' are."""
    return getattr(logging, level.upper()) >= (logging.getLogger("lit_cifar").level or logging.INFO)


def set_rank(rank: int, local_rank: int) -> None:
    """Says which of the processes that train together this one is, and which of those on its node."""
    global _known
    _known = rank, local_rank


def rank() -> int:
    """This process's number among those that train together; 0 where it is alone.

    Before `set_rank` it is what the launcher says, where there is one: the variables alone prove nothing, since a
    process that trains alone may have inherited them.
    """
    return _known[0] if _known else _launched("RANK", "SLURM_PROCID")


def local_rank() -> int:
    """This process's number among those of its node."""
    return _known[1] if _known else _launched("LOCAL_RANK", "SLURM_LOCALID")


def _launched(of_torchrun: str, of_slurm: str) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ[of_torchrun])
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return int(os.environ.get(of_slurm, "0"))
    return int(os.environ.get("LOCAL_RANK", "0")) if CHILD_VARIABLE in os.environ else 0


def debug(line: str) -> None:
    """Prints on standard error, at level 'debug' only, what explains how something is done."""
    if is_said("debug"):
        print(f"lit_cifar: debug: {_who()}{line}", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Says on standard error what goes on; other ranks than the first say who they are."""
    if is_said("info"):
        print(f"{_who()}{line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Says on standard error what someone may have to do something about."""
    if is_said("warning"):
        print(f"lit_cifar: warning: {_who()}{line}", file=sys.stderr, flush=True)


def _who() -> str:
    return f"rank {rank()}: " if rank() else ""
