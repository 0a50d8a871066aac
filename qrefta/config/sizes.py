"""Numbers of bytes, as people write them: 8000000, "8MB", "8MiB"."""

import re
from numbers import Integral

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes from a whole number or from text such as "8MB" (10^6) or "8MiB" (2^20).

    Raises:
        ValueError: for any other value, naming the setting.
    """
    count = _bytes_of_text(size) if isinstance(size, str) else size
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(
            f'{name} is {size!r}; give a positive number of bytes, or text like "8MB" or "8MiB"'
        )
    return int(count)


def _bytes_of_text(text: str) -> int | None:
    """Bytes of a number with or without a unit; None for other text."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMG]I?B)?\s*", text, flags=re.IGNORECASE)
    try:
        return None if match is None else int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    except ValueError:  # "1.2.3"
        return None
