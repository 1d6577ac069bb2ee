"""Seconds of a run by what they were spent on. Whoever does a part times it here, in any room; fit.py writes them into
`results.json`."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

PARTS = ("whitening", "compile", "graph", "steps", "save")
_seconds: dict[str, float] = {}
_open: list[str] = []  # parts under way, each within the one before it
_turned = 0.0  # when the innermost of them began or went on, on time.perf_counter's clock


def reset() -> None:
    """Forgets the run before."""
    _open.clear()
    _seconds.clear()
    _seconds.update(dict.fromkeys(PARTS, 0.0))


def note(span: str, seconds: float) -> None:
    """Notes how long a span took in which parts lie, such as the way to the first step."""
    _seconds[span] = seconds


def seconds() -> dict[str, float]:
    """Of each part up to now, and of the spans that were noted. A second counts in one part: one within another, such
    as a save between two steps, stops the other's clock."""
    _turn()
    return dict(_seconds)


@contextlib.contextmanager
def timed(part: str, device: Any = None) -> Iterator[None]:
    """Counts the body as a part; with a torch.device, from when that has done all it was told before to when it is done
    with the body."""
    wait_for(device)
    _turn()
    _open.append(part)
    try:
        yield
        wait_for(device)
    finally:
        stop(part)


def start(part: str) -> None:
    """Begins a part that has no body, or goes on with it."""
    if part not in _open:
        _turn()
        _open.append(part)


def stop(part: str, device: Any = None) -> None:
    """Ends a part that has begun."""
    if part in _open:
        wait_for(device)
        _turn()
        _open.remove(part)


def wait_for(device: Any) -> None:
    """Waits until a torch.device has done what it was told: launching work takes no time, doing it does."""
    if device is not None and device.type in ("cuda", "mps"):
        import torch  # here, because commands without a net start without it

        getattr(torch, device.type).synchronize()


def _turn() -> None:
    global _turned
    now = time.perf_counter()
    if _open:
        _seconds[_open[-1]] = _seconds.get(_open[-1], 0.0) + now - _turned
    _turned = now
