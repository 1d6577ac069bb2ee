"""The processes that train together: fit starts those of its node, and each waits for the others only so long. What one
of them does is in training/ranks.py; Slurm and torchrun start theirs themselves."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.process import LAUNCHER_VARIABLE, TIMEOUT_VARIABLE
from lit_cifar.run.stop import Stopped
from lit_cifar.text import inherited

TIMEOUT_SECONDS = 600  # as long as torchrun waits for a node
GRACE_SECONDS = 20  # for rank 0 to end by itself when another rank has ended, most often for the same reason


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this node, which end with this process, and ends it when one of them is lost.

    Lightning's own leaves them running when this process is killed. It kills this process without a word when another
    one ended with an exit code, even if this one is just about to end in order.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:  # torchrun started another number of processes
            raise UserError(str(error)) from error
        if not self.cluster_environment.creates_processes_externally:
            child = os.environ.get(log.CHILD_VARIABLE, "")
            with inherited(LAUNCHER_VARIABLE, str(os.getpid())), inherited(log.CHILD_VARIABLE, child):
                self._call_children_scripts()
            self._ending = threading.Lock()
            threading.Thread(target=self._watch, daemon=True, name="other ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except (UserError, Stopped):
            raise
        except Exception:  # perhaps torch's complaint that another rank is gone, whose end says more
            end = time.monotonic() + 2
            while self.procs and time.monotonic() < end:
                self._end_if_lost(lambda code: code != 1)  # one that ended with a traceback ended alike
                time.sleep(0.1)
            raise

    def kill(self, signum: Any) -> None:
        with getattr(self, "_ending", contextlib.nullcontext()):  # at Ctrl-C: they are not lost
            super().kill(signum)
            if signum == getattr(signal, "SIGKILL", signal.SIGTERM):
                self.procs = []

    def _watch(self) -> None:
        while any(process.poll() is None for process in self.procs):
            time.sleep(0.5)
            if any((process.poll() or 0) > 0 for process in self.procs):
                time.sleep(GRACE_SECONDS)
            self._end_if_lost(lambda code: True)

    def _end_if_lost(self, counts: Callable[[int], bool]) -> None:
        with self._ending:
            for rank, process in enumerate(self.procs, start=1):
                code = process.poll()
                if code and counts(code):
                    self._end(rank, code)

    def _end(self, rank: int, code: int) -> NoReturn:
        for process in self.procs:
            process.kill()
        for process in self.procs:
            process.wait()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if code != 2:  # which has said why
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = ", perhaps for want of memory" if code == -9 else ""
            line = f"rank {rank} {how}{why}, and the others with it: start again, fit with --resume if-any"
            print(f"lit_cifar: error: {line}", file=sys.stderr, flush=True)
        os._exit(code if 0 < code < 256 else 1)  # a crash on Windows has a code beyond what it takes


def bound_waiting(trainer: Trainer, strategy: object) -> None:
    """Has no process wait for another one longer than LIT_CIFAR_TIMEOUT says, and none outlive the one it started from.

    Args:
        trainer: with any strategy.
        strategy: the setting; what somebody made of one keeps its own timeout.

    Raises:
        UserError: the environment has no such number, or a LOCAL_RANK that is none.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        return
    chosen: Any = trainer.strategy
    seconds = int(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT_SECONDS))
    if not 1 <= seconds <= 10**6:
        raise UserError(f"{TIMEOUT_VARIABLE}={seconds} in the environment: expected 1 to 1000000 seconds")
    if isinstance(strategy, str) and hasattr(chosen, "_timeout"):
        chosen._timeout = timedelta(seconds=seconds)
    if sys.platform == "win32" and getattr(chosen, "_process_group_backend", "") is None:
        chosen._process_group_backend = "gloo"  # for GPUs too: torch has no NCCL there
    launcher = chosen.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        local_rank = launcher.cluster_environment.local_rank()
        if local_rank >= launcher.num_processes:
            raise UserError(
                f"LOCAL_RANK={local_rank} is not one of {launcher.num_processes} devices: unset it, or choose other "
                "--devices"
            )
        chosen._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        chosen.setup_environment = partial(_meet, launcher, chosen.setup_environment)


def _meet(launcher: _SubprocessScriptLauncher, meet: Callable[[], None]) -> None:
    """Around what connects the processes: one line if they do not find each other.

    Raises:
        UserError: they do not.
    """
    environment = launcher.cluster_environment
    try:
        address, port = environment.main_address, environment.main_port
        if launcher.num_nodes == 1:  # elsewhere a node's name may be known only once it is up, for which torch waits
            socket.getaddrinfo(address, port)
        with _ended_at_once():
            meet()
    except (RuntimeError, ValueError, OSError) as error:  # only torch and Lightning are at work here
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        failed = UserError(
            f"rank {log.rank()} did not find the other processes at MASTER_ADDR={os.environ.get('MASTER_ADDR')} "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} ({reason}): correct or unset these, or start all processes "
            f"within {TIMEOUT_VARIABLE} seconds (default: {TIMEOUT_SECONDS})"
        )
        failed.of_node, failed.of_rank = True, isinstance(environment, LightningEnvironment)  # started by hand
        raise failed from error


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Lets signals end the process as the system does: torch's waiting keeps Python from handling them."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                handlers[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
