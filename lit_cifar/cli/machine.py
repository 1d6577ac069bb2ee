"""Threads, kernels, memory and Slurm: what suits the machine; and how a command ends on it."""

import contextlib
import ctypes
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_cifar import errors, log
from lit_cifar.cli import blame
from lit_cifar.data.workers import worker_error
from lit_cifar.errors import UserError
from lit_cifar.run.stop import STOPPED, Stopped
from lit_cifar.text import in_command

# Up to this many images times parameters a step is too small for two threads and for oneDNN's preparations. The
# tutorial's net at batch 4 (0.25 million): forward, backward and SGD take 1.65 ms with oneDNN and 1.20 without (one
# thread, torch 2.14, 2 CPU cores); two threads gain nothing and lose much when another process wants a core
SMALL_STEP = 2**20
_num_threads = 0  # before they were reduced for small steps; 0: they are as many as ever
RANK_0_SECONDS = 10.0  # for rank 0 to end by itself, when another process has found something
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)

SWITCHED_ON = ("callbacks", "profilers", "tuner")  # parts of Lightning that do nothing unless they are chosen
DEBUGGING = (
    "_init_debugging_flags",
    "_determine_batch_limits",
)  # its functions that name fast_dev_run, overfit_batches


def slurm_environment() -> SLURMEnvironment | None:
    """Slurm's environment where Lightning would choose it, but leaving signals to Checkpoints.

    Lightning's own saves in mid-step at SIGUSR1 and requeues the job itself, beside the job's script.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # --ntasks without --ntasks-per-node
        raise UserError(f"the Slurm allocation does not suit: {error}") from error


def check_allocation(slurm: SLURMEnvironment, trainer: Trainer) -> None:
    """Each task that srun started is one device; with one device Lightning does not look, and all would train alone."""
    num_tasks, num_processes = slurm.world_size(), trainer.num_devices * trainer.num_nodes
    if "SLURM_STEP_ID" in os.environ and num_tasks != num_processes:  # which srun gives to what it starts
        raise UserError(
            f"Slurm started {num_tasks} tasks, one for each device, but --devices {trainer.num_devices} on --num_nodes "
            f"{trainer.num_nodes} makes {num_processes}: set --ntasks-per-node to the number of --devices, and --nodes "
            "to --num_nodes"
        )
    if num_processes > 1:
        try:
            slurm.validate_settings(trainer.num_devices, trainer.num_nodes)
        except ValueError as error:
            raise UserError(f"the Slurm allocation does not suit: {error}") from error


def suit_cpu(size: int) -> None:
    """Settles threads, kernels and memory on the CPU for a step of `size` images times parameters, each time anew."""
    global _num_threads
    small = size <= SMALL_STEP
    torch.backends.mkldnn.enabled = not small  # type: ignore[assignment]
    if "OMP_NUM_THREADS" not in os.environ:
        if small and not _num_threads:
            _num_threads = torch.get_num_threads()
            torch.set_num_threads(1)
        elif _num_threads and not small:
            torch.set_num_threads(_num_threads)
            _num_threads = 0
    if not small:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, where the C library is glibc.

    By default glibc gives each large block back to the system, which fills the next one with zeros page by page: a step
    of SpeedNet on 2,000 images took 12 to 13 s so and 6.0 to 6.6 s with its memory kept (2 CPU cores, torch 2.14).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def on_each_node() -> Iterator[None]:
    """Around what reads files that each node may have of its own: each node says what is wrong with them."""
    try:
        yield
    except UserError as error:
        error.of_node = True
        raise


def _is_switched_on(record: logging.LogRecord) -> bool:
    from_part = os.path.basename(os.path.dirname(record.pathname)) in SWITCHED_ON
    return from_part or record.funcName in DEBUGGING or record.levelno >= logging.WARNING


def _is_no_hint(record: logging.LogRecord) -> bool:
    return record.funcName != "_check_cuda_matmul_precision"


def set_log_level(level: str) -> None:
    """As `log.set_level`, for Lightning's lines and Python's warnings too.

    Lightning reports by its log at INFO. What somebody switched on, such as a profiler, a summary or a search, is
    printed; its notes on what it found, and on how it could be extended, are for 'debug'. What is not about one rank is
    said by the first alone.
    """
    log.set_level(level)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel({"debug": "INFO", "error": "ERROR"}.get(level, "WARNING"))
    says = level == "info" and not log.rank()
    shared = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # by which all modules may report
    for logger in (shared, *(logging.getLogger(f"lightning.pytorch.{part}") for part in SWITCHED_ON)):
        logger.setLevel("INFO" if says else "NOTSET")
    shared.removeFilter(_is_switched_on)
    if says:
        shared.addFilter(_is_switched_on)
    if level == "error" or (log.rank() and level != "debug"):
        warnings.simplefilter("ignore")
    # hints at TF32, which --model.tf32 decides: Lightning's, and torch's when it compiles
    shared.addFilter(_is_no_hint)
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    # printed on each machine that has Slurm, where no job runs
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    warnings.filterwarnings("ignore", message="The number of training batches")  # Progress logs short epochs too
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation set
    # Lightning 2.6.6 asks torch 2.15 in a way that is to go (utilities/_pytree.py:21); users cannot fix it
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")


def set_rank(trainer: Trainer) -> None:
    """Lets the Trainer's strategy say which rank this process is. Lightning itself asks variables such as RANK, which
    a process that trains alone may have inherited from a pod or a Slurm task."""
    log.set_rank(trainer.global_rank, trainer.local_rank)
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]


@contextlib.contextmanager
def workers_watched() -> Iterator[None]:
    """Around a command: a signal handler of torch reports a worker that dies, wherever the command is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error) and (found := worker_error(error)):
            raise found from error
        raise


def run(command: Callable[[list[str]], None]) -> NoReturn:
    """As `errors.run`; what is the user's to fix although Lightning, a package or a net complains is so too.

    Only the first process says so, and where it may be wrong on one node alone, the first process of each node. What is
    found by one process alone is said by that one, and the others end with code 1: perhaps it was killed, and a restart
    helps. A training run that a signal stopped ends with code STOPPED.
    """

    def on_this_rank(args: list[str]) -> None:
        set_log_level("info")  # until the settings are read
        try:
            explained(command, args)
        except UserError as error:
            if log.is_said("debug"):
                traceback.print_exception(error)
            rank = log.rank()
            if rank == 0:
                raise
            if error.of_node and log.local_rank() == 0:
                raise UserError(f"rank {rank} on {socket.gethostname()}: {error}") from error
            if (error.of_rank or log.CHILD_VARIABLE in os.environ) and _is_rank_0_silent():
                raise UserError(f"rank {rank} on {socket.gethostname()}: {error}") from error
            sys.exit(2)
        except RuntimeError as error:
            if not blame.is_another_process_gone(error):
                raise
            if log.rank() == 0:
                print("lit_cifar: another process of this run has ended: see its error, if it had one", file=sys.stderr)
            sys.exit(1)
        except Stopped as stopped:
            if log.rank() == 0:
                sys.stdout.flush()
                print(f"lit_cifar: {stopped}", file=sys.stderr, flush=True)
            sys.exit(STOPPED)

    errors.run(on_this_rank)


def _is_rank_0_silent() -> bool:
    """Waits for the first process, which has perhaps found the same and said so: it ends then, as does its launcher."""
    launcher, until = os.getppid(), time.monotonic() + RANK_0_SECONDS
    while time.monotonic() < until:
        if os.getppid() != launcher:
            return False
        time.sleep(0.1)
    return True


@in_command()
def explained(command: Callable[[list[str]], None], args: list[str]) -> None:
    """Runs a command, whose exceptions are UserError where blame.py says that the user can fix them."""
    try:
        with workers_watched():
            command(args)
    except (UserError, Stopped):
        raise
    except Exception as error:
        line = None if blame.is_another_process_gone(error) else blame.explain(error)
        if line is None:
            raise
        explanation = UserError(line)
        explanation.of_rank = True
        raise explanation from error
