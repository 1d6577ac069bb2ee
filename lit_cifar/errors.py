"""What the user can fix: its exceptions, and how a command ends with it. cli/machine.py adds what Lightning refuses."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from lit_cifar import process
from lit_cifar.process import ReaderGone

READER_GONE = 128 + 13  # the exit code of a program that SIGPIPE ends, such as `yes` in `yes | head`


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""

    of_node = False  # whether it may be wrong on this node and on no other
    of_rank = False  # whether it may be wrong in this process and in no other


class DivergedError(UserError):
    """A training run whose loss or weights are no longer finite."""


class FlagParser(argparse.ArgumentParser):
    """Argparse with errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def run(command: Callable[[list[str]], None], reader_gone: int = READER_GONE) -> NoReturn:
    """Runs a command on sys.argv, and exits with 0 when it is done, or with 2 and one line when the user can fix it.

    Output that cannot be written is left out, and the exit code is 2 in the end. Ctrl-C ends the command in order,
    with code 130; a second one ends it at once.

    Args:
        command: takes the command line without the program's name.
        reader_gone: exit code when whatever reads the output has gone, such as `head`.
    """
    process.begin()
    if signal.getsignal(signal.SIGINT) is process.leave:
        signal.signal(signal.SIGINT, process.interrupt)
    code: object = reader_gone
    with contextlib.suppress(ReaderGone):
        code = _code_of(command)
        sys.stdout.flush()
    if signal.getsignal(signal.SIGINT) is process.interrupt:
        signal.signal(signal.SIGINT, process.leave)  # Python's own end prints tracebacks too
    sys.exit(2 if process.output_failed() and not code else code)  # type: ignore[arg-type]


def _code_of(command: Callable[[list[str]], None]) -> object:
    try:
        command(sys.argv[1:])
    except BaseException as error:
        if process.is_interrupted():  # Lightning makes a SystemExit of it, and others other things
            return process.INTERRUPTED
        if isinstance(error, SystemExit):
            return error.code
        if not isinstance(error, UserError):
            raise
        with contextlib.suppress(ReaderGone):
            sys.stdout.flush()
        print(f"lit_cifar: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    return 0
