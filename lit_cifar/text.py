"""Text for people: aligned columns, safe names, the nearest spelling. What is told is its callers'."""

import difflib
from collections.abc import Iterable, Sequence


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Lines with the cells of each column below one another; columns numbered in `right` end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """`text` as it may stand in one line on a terminal: names in files are whatever someone put there."""
    return text if text.isprintable() else repr(text)


def nearest(typed: str, known: Iterable[str]) -> str:
    """': did you mean X?' for the known spelling nearest to what was typed; empty when none is near."""
    close = difflib.get_close_matches(typed, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
