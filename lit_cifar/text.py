"""Text for people: aligned columns, printable names, the nearest spelling, what settings are called. No sentences: they
stand where they are printed."""

import difflib
import functools
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

COMMAND_VARIABLE = "LIT_CIFAR_COMMAND"  # set in a command, and so in the workers that it starts
SECTIONS = ("model", "data", "trainer", "checkpoint", "running_loss")  # of flags; each is one object in Python
IN_PYTHON = {"true": "True", "false": "False", "null": "None", "--resume": "ckpt_path", "--seed_everything": "seed"}
# A flag, and the value after it: quoted, a URL, in brackets, a number, a word that is no prose, or one of these
FLAG = re.compile(
    r"""(?<![\w/'"=-])(\bwith\ )?(--[a-z_]+(?:\.\w+)*)(?![\w-])
    (?:[ =]('[^']*'|\w+:/[^\s,;)]*[^\s,.:;)]|\[[^]]*]|-?\d[\w.+-]*|[\w.~/\\-]*[\w~][\d._/\\][^\s,:;)]*|
    true|false|null|True|False|None|-?nan|-?inf|shapes|reflect|zeros|none|linear|cosine|onecycle|constant|muon|sgd|auto)
    (?<!\.)(?=[\s,.:;)]|$))?""",
    re.VERBOSE,
)


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Lines with the cells of each column below one another; the columns numbered in `right` are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def wrapped(text: str, first: str = "", others: str = "") -> str:
    """`text` in lines as wide as the terminal, within reason, after what the first and the other lines begin with."""
    num_columns = min(max(shutil.get_terminal_size().columns, 40), 100)
    wrapper = textwrap.TextWrapper(num_columns, first, others, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """Lines with each term and, beside it, what it means, wrapped."""
    indent = max(len(term) for term, _ in rows) + 4
    return "\n".join(wrapped(meaning, f"  {term}".ljust(indent), " " * indent) for term, meaning in rows)


def printable(text: str) -> str:
    """`text` as one line that is safe on a terminal: what a file holds may contain control characters."""
    return text if text.isprintable() else repr(text)


def escaped(line: str) -> str:
    """`line` with escapes in place of control characters, the last resort before a terminal."""
    return line if line.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def nearest(typed: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known spelling nearest to what was typed; empty when none is near."""
    spelt = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(typed.casefold(), list(spelt), n=1)
    return f" (did you mean {spelt[close[0]]}?)" if close else ""


@contextmanager
def inherited(variable: str, value: str) -> Iterator[None]:
    """Within it, this process and those that it starts find a variable in their environment."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable, None) if before is None else os.environ.update({variable: before})


# around the main function of a command: `as_said` keeps flags
in_command = functools.partial(inherited, COMMAND_VARIABLE, "1")


def is_command() -> bool:
    """Whether a command runs, or this process works for one."""
    return COMMAND_VARIABLE in os.environ


def as_said(line: str) -> str:
    """A line about settings, which names flags, with their arguments of Python instead where no command runs.

    `--data.drop_last true` is drop_last=True there, and `--model.net.num_classes 10` net.num_classes=10.
    """
    if is_command():
        return line
    return FLAG.sub(_in_python, re.sub("; (--log_level debug prints more|see --help)", "", line))


def _in_python(found: re.Match[str]) -> str:
    preposition, flag, value = found.groups("")
    first, *others = flag[2:].split(".")
    name = IN_PYTHON.get(flag) or ".".join(others if others and first in SECTIONS else (first, *others))
    if not value:
        return f"{preposition}{name}=..." if preposition else name
    try:
        float(value)
    except ValueError:
        if value not in ("True", "False", "None") and value[0] not in "'[":
            value = IN_PYTHON.get(value, repr(value))
    return f"{preposition}{name}={value}"
