"""Stopping: the signals that ask for it, and how all ranks agree to stop after the same step. save.py saves the state
first."""

import signal
import time
from typing import Any

import torch

# Windows has no SIGUSR1, and SIGTERM ends a process at once there; SIGBREAK is its Ctrl-Break
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name))
APART_SECONDS, MOST_APART = 0.1, 32  # between two times that ranks confer; and in steps, which may become slower
STOPPED = 75  # exit code of a run that a signal ended and that can be resumed; EX_TEMPFAIL of sysexits.h


class Stopped(Exception):
    """A signal ended the training after its state was saved; the run can be resumed."""


class Agreement:
    """Two yes-or-no questions that all ranks answer alike: yes as soon as one rank says so, and goes on saying so.

    Asked after each step. Ranks confer after as many steps as take APART_SECONDS on the fastest one. An answer is
    fetched when they confer the next time, so that no step waits for one; Lightning's own broadcast, which each step
    waits for, took 9 % of a step of the tutorial's net on 2 processes, and to confer after each step 3 % at batch 64
    and 14 % at batch 4 (py-spy).
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._num_asked, self._num_apart = 0, 1  # since ranks conferred, and when they do so again
        self._conferred = time.perf_counter()
        self._answers: torch.Tensor | None = None
        self._work: Any = None

    def ask(self, *questions: bool, wait: bool = False) -> tuple[bool, bool]:
        """Answers to the questions as asked some time before; as asked now, if the ranks shall wait for each other."""
        first, second = questions
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return first, second
        self._num_asked += 1
        if self._num_asked < self._num_apart and not wait:
            return False, False
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: the device is not asked
        before = self._fetch()
        now = time.perf_counter()
        num_apart = int(APART_SECONDS * self._num_asked / max(now - self._conferred, 1e-9))
        self._num_asked, self._conferred = 0, now
        self._answers = torch.tensor([first, second, min(max(num_apart, 1), MOST_APART)])
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
        first, second, self._num_apart = self._answers.tolist()
        return bool(first), bool(second)
