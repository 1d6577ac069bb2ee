"""Settings given in Python, checked by their annotations as the parser checks flags. Which settings there are is in
datamodule.py and augment.py."""

import inspect
import math
import re
import types
from typing import Any, Literal, SupportsFloat, SupportsIndex, Union, get_args, get_origin

from lit_cifar.errors import UserError


def check_settings(settings: dict[str, Any], kinds: dict[str, Any], section: str) -> None:
    """Checks settings by the annotations of the arguments that they are given as.

    Args:
        settings: by name; may hold more than that.
        kinds: the annotations, by name.
        section: what settings are called before a dot: "--data".

    Raises:
        UserError: one is of another kind, or out of its range.
    """
    for name, kind in kinds.items():
        if name != "return" and not _fits(settings[name], kind):
            given = " ".join(repr(settings[name]).split())[:200]
            expected = re.sub(r"[\w.]+\.", "", inspect.formatannotation(kind))
            raise UserError(f"{section}.{name} is {given}: expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return isinstance(value, str) and value in inside
    if origin in (list, tuple):
        is_long_enough = isinstance(value, (list, tuple)) and (origin is list or len(value) == len(inside))
        return is_long_enough and all(_fits(one, inside[0]) for one in value)
    if kind is bool or not issubclass(kind, (int, float)):
        return isinstance(value, kind)
    try:  # of jsonargparse's types, which convert text too
        is_number = isinstance(value, SupportsIndex if issubclass(kind, int) else SupportsFloat)
        return is_number and not isinstance(value, bool) and abs(kind(value)) < math.inf
    except (TypeError, ValueError):
        return False
