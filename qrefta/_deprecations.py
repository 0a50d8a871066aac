"""Keywords that public functions still take for one release, with a warning."""

import warnings
from collections.abc import Mapping
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
