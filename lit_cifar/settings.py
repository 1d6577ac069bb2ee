"""Settings checked against the annotations of a signature, and ranges of numbers as types for these, which jsonargparse
checks too. The class that takes a setting decides which range it has."""

import math
import reprlib
from collections.abc import Callable
from dataclasses import is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)
from torch import Tensor, nn

from lit_cifar.errors import UserError
from lit_cifar.text import printable

__all__ = [
    "ClosedUnitInterval",
    "HalfOpenUnitInterval",
    "NonNegativeFloat",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Side",
    "checked",
    "checked_arguments",
]

HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # as numpy's
Side = restricted_number_type("Side", int, [(">=", 8), ("<=", 32)])  # of an image, in pixels


def checked_arguments(function: Any, given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arguments of a function or class, as `checked` gives each; `prefix` is what their flags begin with."""
    hints = get_type_hints(function)
    return {key: checked(prefix + key, given[key], hints[key]) for key in given}


def checked(flag: str, value: Any, kind: Any) -> Any:
    """A setting as plain numbers, texts and lists, which a checkpoint can hold and the parser's own types cannot be.

    The parser has checked it already; this is for those who make the class in Python.

    Args:
        flag: what the setting is called on the command line.
        value: the setting; arrays, tensors and NumPy's numbers stand for Python's.
        kind: its annotation.

    Raises:
        UserError: it is of another kind, or out of range.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    shown = printable(reprlib.repr(value)) if type(value).__module__ == "builtins" else f"of {type(value).__name__}"
    if origin in (Union, UnionType):
        return None if value is None else checked(flag, value, parts[0])
    if origin is Literal:
        if value not in parts:
            raise UserError(f"{flag} {shown} is none of {', '.join(parts)}")
    elif origin is Callable:
        if not callable(value):
            raise UserError(
                f"{flag} {shown} is no class, such as torch.optim.AdamW, and no other callable that makes one; "
                "functools.partial gives a class its arguments"
            )
    elif origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{flag} {shown} is no list{' of torch.nn.Module' * (parts[0] is nn.Module)}")
        if origin is tuple and len(value) != len(parts):
            raise UserError(f"{flag} {shown}: give {len(parts)} numbers, one for each channel")
        kinds = parts if origin is tuple else parts * len(value)
        return [checked(flag, inner, kind) for inner, kind in zip(value, kinds, strict=True)]
    elif is_dataclass(kind):
        return _checked_fields(flag, value, kind)
    elif issubclass(kind, (int, float)):
        return _checked_number(f"{flag} {shown}", value, kind)
    elif not isinstance(value, kind):
        if kind is str:
            raise UserError(f"{flag} {shown} is no text")
        raise UserError(f"{flag} gives {type(value).__name__}, no torch.nn.Module")
    return value


def _checked_number(said: str, value: Any, kind: Any) -> Any:
    """A truth value, a whole number or a number, within the range of its kind."""
    wanted: Any = Integral if issubclass(kind, int) else Real
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, wanted):
        name = "a whole number" if wanted is Integral else "a number"
        raise UserError(f"{said} is not {'True or False' if kind is bool else name}")
    try:
        kind(value)
        is_finite = math.isfinite(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{said} is out of range: {error}") from None
    if not is_finite:
        raise UserError(f"{said} is not finite")
    return bool(value) if kind is bool else int(value) if issubclass(kind, int) else float(value)


def _checked_fields(flag: str, value: Any, kind: Any) -> Any:
    """A dataclass, of itself or of a dict."""
    hints = get_type_hints(kind)
    try:
        made = value if isinstance(value, kind) else kind(**value)
    except TypeError:
        want = f"{kind.__name__}(...), or a dict of {', '.join(hints)}"
        raise UserError(
            f"{flag}: {printable(reprlib.repr(value))} is no {kind.__name__.lower()}: want {want}"
        ) from None
    prefix = f"{flag}: {made.name}'s " if "name" in hints else f"{flag}."
    return kind(**checked_arguments(kind, {key: getattr(made, key) for key in hints}, prefix))
