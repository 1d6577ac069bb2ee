"""Stopping: the signals that ask for it, and how all ranks agree to stop after the same step. save.py saves the state
first."""

import signal
from typing import Any

import torch

# Windows has no SIGUSR1, and SIGTERM ends a process at once there; SIGBREAK is its Ctrl-Break
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name))
STOPPED = 75  # exit code of a run that a signal ended and that can be resumed; EX_TEMPFAIL of sysexits.h


class Stopped(Exception):
    """A signal ended the training after its state was saved; the run can be resumed."""


class Agreement:
    """Two yes-or-no questions that all ranks answer alike: yes as soon as one rank says so.

    Asked after each step. An answer is fetched when the next is asked for, so that no step waits for one; Lightning's
    own broadcast, which each step waits for, took 9 % of a step of the tutorial's net on 2 processes (py-spy).
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._answers: torch.Tensor | None = None
        self._work: Any = None

    def ask(self, *questions: bool, wait: bool = False) -> tuple[bool, bool]:
        """Answers to the questions as asked the time before; as asked now, if the ranks shall wait for each other."""
        first, second = questions
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return first, second
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: the device is not asked
        before = self._fetch()
        self._answers = torch.tensor([first, second], dtype=torch.uint8)
        self._work = torch.distributed.all_reduce(
            self._answers, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return self._fetch() if wait else before

    def _fetch(self) -> tuple[bool, bool]:
        if self._work is None:
            return False, False
        self._work.wait()
        self._work = None
        assert self._answers is not None
        first, second = self._answers.tolist()
        return bool(first), bool(second)
