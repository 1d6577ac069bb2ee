"""Lines about work under way, by level: what goes on, and warnings. What is said, and when, is its callers'; results
are always printed, by who has them, and so are errors, by errors."""

import logging
import os
import sys
from typing import Literal, get_args

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(Level)
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # torchrun's, srun's, the Trainer's, which also torchrun sets
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID")


def set_level(level: str) -> None:
    """Says only what is at least so urgent: 'debug', 'info', 'warning' or 'error'."""
    logging.getLogger("lit_cifar").setLevel(level.upper())


def is_said(level: Level) -> bool:
    """Whether lines of a level are wanted; where nobody has set one, those of 'info' are."""
    return getattr(logging, level.upper()) >= (logging.getLogger("lit_cifar").level or logging.INFO)


def rank() -> int:
    """This process's number among those that train together, as whatever started it says; 0 where it is alone."""
    return _first(RANK_VARIABLES)


def local_rank() -> int:
    """This process's number among those of its node."""
    return _first(LOCAL_RANK_VARIABLES)


def _first(variables: tuple[str, ...]) -> int:
    return next((int(os.environ[name]) for name in variables if os.environ.get(name, "").isdecimal()), 0)


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
