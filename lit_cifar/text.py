"""Text for people: aligned columns, printable names, the nearest spelling. No sentences: they stand where they are
printed."""

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Sequence


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
    """': did you mean X?' for the known spelling nearest to what was typed; empty when none is near."""
    spelt = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(typed.casefold(), list(spelt), n=1)
    return f": did you mean {spelt[close[0]]}?" if close else ""
