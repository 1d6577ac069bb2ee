"""What the user can fix: its exceptions, and how a command ends with it. cli/machine.py adds what Lightning refuses."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import NoReturn, TypeVar

from lit_cifar.process import INTERRUPTED, ReaderGone, begin, imported, interrupt, is_interrupted, leave, output_failed
from lit_cifar.text import as_said, escaped, in_command, nearest

Function = TypeVar("Function", bound=Callable[..., object])
MEMORY = (
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|MemoryError|Unable to allocate"
    r"|paging file is too small|error code: <1455>"  # Windows
)
READER_GONE = 128 + 13  # the exit code of a program that SIGPIPE ends, such as `yes` in `yes | head`


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2.

    It is written with flags, and says what these are in Python where it is raised outside a command.
    """

    of_node = False  # whether it may be wrong on this node and on no other
    of_rank = False  # whether it may be wrong in this process and in no other

    def __init__(self, line: str) -> None:
        super().__init__(as_said(line))


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
        if found := re.search(r"unrecognized arguments: (\S+)", message):
            message = unknown_flag(found[1], self._option_string_actions)
        raise UserError(message.removeprefix("argument "))


def unknown_flag(typed: str, known: Iterable[str]) -> str:
    """What is said of a word on the command line that no parser knows."""
    flag = typed.split("=")[0]
    near = nearest(flag, [name for name in known if name.startswith("--")])
    kind = "unknown flag" if flag[0] == "-" else "unknown argument"
    return f"{kind} {flag}{near}; --help lists the flags"


def run(command: Callable[[list[str]], None], reader_gone: int = READER_GONE) -> NoReturn:
    """Runs a command on sys.argv, and exits with 0 when it is done, or with 2 and one line when the user can fix it.

    Output that cannot be written is left out, and the exit code is 2 in the end. Ctrl-C ends the command in order,
    with code 130; a second one ends it at once.

    Args:
        command: takes the command line without the program's name.
        reader_gone: exit code when whatever reads the output has gone, such as `head`.
    """
    begin()
    imported()
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, interrupt)
    code: object = reader_gone
    with contextlib.suppress(ReaderGone):
        code = _code_of(command)
        sys.stdout.flush()
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, leave)  # Python's own end prints tracebacks too
    sys.exit(2 if output_failed() and not code else code)  # type: ignore[arg-type]


@in_command()
def _code_of(command: Callable[[list[str]], None]) -> object:
    try:
        command(sys.argv[1:])
    except BaseException as error:
        if is_interrupted():  # Lightning makes a SystemExit of it, and others other things
            return INTERRUPTED
        if isinstance(error, SystemExit):
            return error.code
        if not isinstance(error, UserError):
            raise
        with contextlib.suppress(ReaderGone):
            sys.stdout.flush()
        sys.unraisablehook = lambda unraisable: None  # objects whose making failed may complain as they go
        print(f"lit_cifar: error: {escaped(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        return 2
    return 0
