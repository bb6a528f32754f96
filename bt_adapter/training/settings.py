"""Check the numbers and types of every command's arguments and every recipe.

It does not import torch, so that invalid arguments are reported immediately.
"""

from __future__ import annotations

import math
import numbers
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bt_adapter.errors import CommandError

POSITIVE, NATURAL, COUNT = "(0, inf)", "[0, inf)", "[1, inf)"
SHARE, SHARE_BELOW_1 = "[0, 1]", "[0, 1)"
SEED = "[0, 9e18)"

_WORDS = {
    int: "int (a whole number)", float: "float (a number)", bool: "true or false", str: "text", Path: "a path",
    NoneType: "nothing",
}  # fmt: skip


def check_numbers(settings: object, limits: Mapping[str, str]) -> None:
    """Raise CommandError for the first number of a dataclass that is outside its interval.

    Args:
        settings: its fields hold numbers or tuples of numbers. A field that is None or a string is not checked.
        limits: field -> interval, such as "(0, 1]"; "inf" means no bound. NaN lies in no interval.
    """
    for name, interval in limits.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not isinstance(number, str) and not _lies_in(number, interval):
                raise CommandError(f"{option(name)} must {_in_words(interval, number)}, got {number}")


def numeric(kind: type[int] | type[float], interval: str) -> Callable[[str], float]:
    """Make a ``type=`` for argparse that accepts only numbers inside an interval."""

    def parse(text: str) -> float:
        number = kind(text)
        if not _lies_in(number, interval):
            raise ArgumentTypeError(f"must {_in_words(interval, number)}, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse prints it if the text is not a number
    return parse


def _lies_in(number: float, interval: str) -> bool:
    low, high = _bounds(interval)
    above = number > low or (interval[0] == "[" and number == low)
    return above and (number < high or (interval[-1] == "]" and number == high))


def _in_words(interval: str, number: float) -> str:
    low, high = _bounds(interval)
    if high < math.inf or interval.endswith("]"):
        return f"lie in {interval}"
    bound = f"above {low:g}" if interval[0] == "(" else f"{low:g} or more"
    return f"be {bound}" if math.isfinite(number) else f"be a finite number, {bound}"


def _bounds(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high


def check_types(settings: object) -> None:
    """Raise CommandError for the first field of a dataclass whose value does not have the field's type."""
    for name, kind in types_of(settings).items():
        if not fits(value := getattr(settings, name), kind):
            raise CommandError(f"{option(name)} must be {type_in_words(kind)}, got {value!r}")


def types_of(settings: object) -> dict[str, Any]:
    """Return the fields of a dataclass with their types."""
    hints = get_type_hints(type(settings))
    return {name: hints[name] for name in vars(settings) if name in hints}


def fits(value: object, kind: Any) -> bool:
    """Whether a value has a type. An int is also a float; a bool is not a number."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(fits, value, wanted))
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def converted(value: Any, kind: Any) -> Any:
    """Convert a YAML value to ``kind``: YAML has no paths and no tuples, and reads 2e-6 as text.

    Any other value is returned unchanged."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return next((new for part in parts if fits(new := converted(value, part), part)), value)
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) and parts[-1] is Ellipsis else value
        if not isinstance(values, list):
            return value
        wanted = parts[:1] * len(values) if parts[-1] is Ellipsis else parts
        return tuple(map(converted, values, wanted)) if len(values) == len(wanted) else value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if kind is float and fits(value, float) else value


def type_in_words(kind: Any) -> str:
    """Describe a type in words for an error message."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(type_in_words(part) for part in parts)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(parts)}"
    if get_origin(kind) is tuple and parts[-1] is Ellipsis:
        return f"a list, each {type_in_words(parts[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(parts)}, each {type_in_words(parts[0])}"
    return _WORDS.get(kind, str(kind))


def option(name: str) -> str:
    """Return a field's name on the command line."""
    return "--" + name.replace("_", "-")
