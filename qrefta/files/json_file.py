"""JSON files, read with care. Torch-free."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if it is no regular file, no JSON, or nested too deeply to be read.
    """
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or unreadable ({error}); copy it again from where it was saved."
        ) from error


def check_regular(path: Path) -> None:
    """Refuse a pipe or device, which would be read for ever; links to files are allowed (hub caches
    use them).
    """
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} is missing, or a pipe, device or folder; copy or save it again as a file."
        )
