"""What the user can mend: its exceptions, and how a command ends with it. What Lightning complains of is cli's."""

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

READER_GONE = 128 + 13  # the exit code of what SIGPIPE ends, such as `yes` in `yes | head`


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""

    of_node = False  # whether it may be wrong on this node and on no other


class DivergedError(UserError):
    """A training whose loss or weights are no longer finite."""


def run(command: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command on sys.argv and exits: 0 when done, 2 with one line when the user can mend it, READER_GONE when
    nobody reads on what it prints. Characters that the output's encoding lacks are written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _code_of(command)
        sys.stdout.flush()
    except BrokenPipeError:
        if _has_reader(sys.stdout.fileno()):
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        code = READER_GONE
    sys.exit(code)


def _has_reader(pipe: int) -> bool:
    poll = select.poll()  # Windows has none, and another error there
    poll.register(pipe, 0)  # what went wrong comes unasked
    return not poll.poll(0)


def _code_of(command: Callable[[list[str]], None]) -> int:
    try:
        command(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()
        print(f"lit_cifar: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
