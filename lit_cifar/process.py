"""The process of a command: its standard streams, Ctrl-C, the process that started it, its garbage, the numbers in its
environment. Commands begin with it, before the imports that take seconds; errors.py ends them."""

import contextlib
import errno
import gc
import io
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn, TextIO

from lit_cifar.log import rank

INTERRUPTED = 128 + signal.SIGINT
LAUNCHER_VARIABLE = "LIT_CIFAR_LAUNCHER"  # the id of the process that started this one, which must not outlive it
TIMEOUT_VARIABLE = "LIT_CIFAR_TIMEOUT"  # seconds that processes that train together wait for one another
PR_SET_PDEATHSIG = 1  # of prctl(2)
SYNCHRONIZE = 0x100000  # of Windows: the right to wait for a process
# that Lightning and torch read, some of them as they are imported
NUMBERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "JSM_NAMESPACE_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE"),
    *("MASTER_PORT", "STANDALONE_PORT", TIMEOUT_VARIABLE),
)
_outputs: list["_Output"] = []  # standard output and standard error, once the process has begun
_interrupted = False


class ReaderGone(BrokenPipeError):
    """Whatever reads the standard output has gone, such as `head`."""


class _Output(io.RawIOBase):
    """Standard output or standard error, whose failures cost nothing: what cannot be written is left out.

    Args:
        stream: the stream as Python has made it, whose buffer is passed by.
        name: what it is called in the line that reports its first failure; nothing is reported without one.
    """

    def __init__(self, stream: io.TextIOWrapper, name: str) -> None:
        self._stream = stream  # which would close what is below it
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer
        self.name = name
        self.failed = False
        self._reader_gone = False

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and not self._reader_gone:  # a nearly full disk takes a part, at which python -u would leave it
                written: int | None = self._raw.write(left)
                left = left[written or 0 :]
                if written is None:
                    time.sleep(0.01)  # whoever shares the stream has set it not to block
        except OSError as error:
            # Windows calls it invalid to write to a pipe that nobody reads any more
            if isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL):
                self._reader_gone = True
                if self.name and rank() == 0:  # the others end with it
                    raise ReaderGone(*error.args) from None
            elif self.name and not self.failed and rank() == 0:
                self.failed = True
                line = f"{self.name} cannot be written ({error.strerror}): make room, or send it elsewhere"
                print(f"lit_cifar: error: {line}", file=sys.stderr, flush=True)
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


def begin() -> None:
    """Makes the process a command's. Called once more it does nothing.

    A standard stream that is closed becomes the null device, and one that fails costs nothing. Ctrl-C ends the process
    with code 130, without a traceback. The process ends with the one that started it, if that asks for it. Until
    `imported` is called, no garbage is collected.
    """
    if _outputs:
        return
    gc.disable()  # it took 0.6 of the 3.5 s of `import lightning.pytorch`, which leaves 10,000 objects of garbage
    _open_streams()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets warn several times of what is reported once
    with contextlib.suppress(ValueError):  # a script that runs a command in a thread keeps its handler
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it, such as nohup
            signal.signal(signal.SIGINT, leave)
    launcher = os.environ.pop(LAUNCHER_VARIABLE, "")  # and processes that this one starts know nothing of it
    if launcher.isdecimal():
        _end_with(int(launcher))
    check_environment()


def imported() -> None:
    """Collects garbage from here on, among what is made from here on."""
    gc.freeze()
    gc.enable()


def check_environment() -> None:
    """Ends the process with one line and code 2 where a variable that holds a number holds none."""
    for name in NUMBERS:
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            if rank() == 0:
                line = f"{name}={value!r} in the environment is not a whole number: correct or unset it"
                print(f"lit_cifar: error: {line}", file=sys.stderr, flush=True)
            sys.exit(2)


def output_failed() -> bool:
    """Whether some of the standard output could not be written, which has been reported."""
    return any(output.failed for output in _outputs)


def leave(number: int, frame: object) -> NoReturn:
    """As a handler: ends the process at once, wherever it is."""
    os._exit(128 + number)


def interrupt(number: int, frame: object) -> NoReturn:
    """As a handler: ends what is being done, in order; when asked a second time, at once."""
    global _interrupted
    _interrupted = True
    signal.signal(number, leave)
    raise KeyboardInterrupt


def is_interrupted() -> bool:
    """Whether Ctrl-C has ended what was being done, whatever exception came of that."""
    return _interrupted


def _open_streams() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number: what is opened later, here or by a program that is started, must not get it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False, encoding="utf-8")
    for number, name, words in ((1, "stdout", "the standard output"), (2, "stderr", "")):
        stream: TextIO = getattr(sys, name) or os.fdopen(number, "w", closefd=False, encoding="utf-8")
        if not isinstance(stream, io.TextIOWrapper):
            continue  # a notebook's, or a test's
        stream.flush()
        output = _Output(stream, words)
        wrapper = io.TextIOWrapper(
            output if stream.write_through else io.BufferedWriter(output),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapper)
        _outputs.append(output)


def _end_with(launcher: int) -> None:
    """Has the system end this process when its launcher ends, in whatever way, or a thread where the system cannot."""
    import ctypes  # its library opens a file of its own, which must not get the number of a closed stream

    if sys.platform == "win32":
        # not by getppid: a venv's python.exe starts the true one, and a parent's id stays when it ends
        kernel = ctypes.WinDLL("kernel32")
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel.OpenProcess(SYNCHRONIZE, False, launcher))  # null if it ended before
        threading.Thread(target=_wait_on_windows, args=(kernel, handle), daemon=True).start()
        return
    prctl = None
    with contextlib.suppress(OSError, AttributeError, TypeError):
        prctl = ctypes.CDLL(None).prctl  # Linux
    if prctl is None or prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it ended before
        os._exit(1)


def _wait_on_windows(kernel: Any, handle: Any) -> None:
    if handle:
        kernel.WaitForSingleObject(handle, -1)
    os._exit(1)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)
