"""What the user can fix: its exceptions, and how a command ends with it. cli/machine.py adds what Lightning refuses."""

import argparse
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from lit_cifar.text import escaped

READER_GONE = 128 + 13  # the exit code of a program that SIGPIPE ends, such as `yes` in `yes | head`


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""

    of_node = False  # whether it may be wrong on this node and on no other


class DivergedError(UserError):
    """A training run whose loss or weights are no longer finite."""


class FlagParser(argparse.ArgumentParser):
    """Argparse with errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def run(command: Callable[[list[str]], None], reader_gone: int = READER_GONE) -> NoReturn:
    """Runs a command on sys.argv, and exits with 0 when it is done, or with 2 and one line when the user can fix it.

    Characters that the output's encoding lacks are written as escapes.

    Args:
        command: takes the command line without the program's name.
        reader_gone: exit code when whatever reads the output has gone, such as `head`.
    """
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
        code = reader_gone
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
        print(f"lit_cifar: error: {escaped(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
