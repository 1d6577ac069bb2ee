"""What the user can fix: its exceptions, and how a command ends with it. cli/machine.py adds what Lightning refuses."""

import argparse
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import NoReturn, TypeVar

Function = TypeVar("Function", bound=Callable[..., object])
MEMORY = r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|MemoryError|Unable to allocate"
READER_GONE = 128 + 13  # the exit code of a program that SIGPIPE ends, such as `yes` in `yes | head`


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""

    of_node = False  # whether it may be wrong on this node and on no other
    of_process = False  # whether it may be wrong for this process and for no other


class DivergedError(UserError):
    """A training run whose loss or weights are no longer finite."""


_callers: dict[CodeType, str] = {}  # of what the user chose, and what they do


def calls_chosen(doing: str) -> Callable[[Function], Function]:
    """Marks a function that calls what the user chose: a net, a callback, a logger, a strategy, the Trainer itself.

    What is raised in there is the user's to fix (cli/blame.py). The function itself stays as it was.

    Args:
        doing: what it does, for messages: 'in training'.
    """

    def mark(function: Function) -> Function:
        assert isinstance(function, FunctionType)
        codes = [function.__code__]
        for code in codes:  # and functions within it
            _callers[code] = doing
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        return function

    return mark


def what_calls(code: CodeType) -> str | None:
    """What a function does that `calls_chosen` marked; None for others."""
    return _callers.get(code)


def is_memory(error: BaseException) -> bool:
    """Whether memory was short, of the machine or of a GPU."""
    return re.search(MEMORY, f"{type(error).__name__}: {error}") is not None


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
        print(f"lit_cifar: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
