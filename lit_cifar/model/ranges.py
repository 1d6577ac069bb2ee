"""Ranges of numeric settings, as types that jsonargparse checks where they stand in a signature. The class that takes a
setting decides which range it has."""

from typing import Any, get_args

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from lit_cifar.errors import UserError

__all__ = [
    "ClosedUnitInterval",
    "HalfOpenUnitInterval",
    "NonNegativeFloat",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Side",
    "checked",
    "one_of",
]

HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # as numpy's
Side = restricted_number_type("Side", int, [(">=", 8), ("<=", 32)])  # of an image, in pixels


def checked(flag: str, value: Any, kind: Any) -> Any:
    """A setting as a plain int or float, which a checkpoint can hold and the parser's own types cannot be.

    The parser has checked it already; this is for those who make the class in Python.

    Args:
        flag: what the setting is called on the command line.
        value: the number.
        kind: its range, a type of this module.

    Raises:
        UserError: it is out of range.
    """
    try:
        kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag} {value} is out of range: {error}") from None
    return int(value) if issubclass(kind, int) else float(value)


def one_of(flag: str, value: Any, kind: Any) -> Any:
    """A setting that is one of a Literal's words, checked for those who make the class in Python.

    Raises:
        UserError: it is none of them.
    """
    if value not in get_args(kind):
        raise UserError(f"{flag} {value!r} is none of {', '.join(get_args(kind))}")
    return value
