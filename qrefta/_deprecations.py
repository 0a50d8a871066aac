"""Keywords and modules of the release before, which still work for one release, with a warning."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def deprecated_keywords(
    function: str, given: Mapping[str, Any], instead: Mapping[str, str]
) -> dict[str, Any]:
    """The deprecated keywords of a call; each is warned about at the caller's line.

    Call it from the public function itself, so that the warning points at the user's code.

    Args:
        function: name of the public function.
        given: its `**keywords`.
        instead: every deprecated keyword, with the text that replaces it.

    Raises:
        TypeError: for a keyword that the function never had.
    """
    for name in given:
        if name not in instead:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        warnings.warn(
            f"{function}({name}=...) is deprecated and will be removed in the next release; "
            f"use {instead[name]}",
            DeprecationWarning,
            stacklevel=3,
        )
    return dict(given)


def moved(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) for names that moved, with a warning at the caller's line.

    Args:
        module: that had the names.
        places: name -> "module:name" where it is now.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new_name = places[name].partition(":")
        warnings.warn(
            f"{module}.{name} is deprecated and will be removed in the next release; "
            f"use {place}.{new_name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(place), new_name)

    return find
