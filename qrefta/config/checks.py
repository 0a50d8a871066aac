"""Checks of values: each returns the value to keep, or raises ValueError with the allowed values.

A field of `Settings` names its check in its metadata, beside the help text of the command line.
"""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

RESTORE = "config.json is damaged: restore it from the folder that save_pretrained wrote."

LARGEST_SEED = 2**32 - 1


def one_of(allowed: Sequence[Any], text: str) -> dict[str, Any]:
    """Metadata of a field that takes one of some values, each of the type that it has here."""

    def check(name: str, value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in allowed):
            listed = ", ".join(str(one) for one in allowed if one is not None)
            raise ValueError(f"{name} is {value!r}; it must be one of {listed}")
        return value

    return {"help": text, "check": check, "allowed": tuple(allowed)}


def checked(check: Callable[[str, Any], Any], text: str) -> dict[str, Any]:
    """Metadata of a field with a check, which returns the value to keep."""
    return {"help": text, "check": check}


def module_names(name: str, value: Any) -> tuple[str, ...]:
    """A list of module names, as a tuple."""
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}; it must be a list of module names")
    names = tuple(value)
    if not all(isinstance(text, str) for text in names):
        raise ValueError(f"{name} is {value!r}; it must be a list of module names")
    return names


def seed_value(name: str, value: Any) -> int:
    """A seed that all generators of random numbers take, numpy's with 32 bits too."""
    seed = whole(name, value, 0)
    if seed > LARGEST_SEED:
        raise ValueError(f"{name} is {seed}; the largest is {LARGEST_SEED}")
    return seed


def whole(name: str, value: Any, smallest: int) -> int:
    """A whole number of any integer type but bool, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {smallest} or more")
    return int(value)


def positive(name: str, value: Any) -> float:
    """A positive, finite number, as a float."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not 0 < float(value) < float("inf")
    ):
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)
