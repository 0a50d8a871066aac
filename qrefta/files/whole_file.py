"""Files to write: whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qrefta.files.folders import sync_folder

_TOKEN_BYTES = 8  # of the names of files that are being written


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    data = text.encode()
    with replacing(path, len(data)) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file under a temporary name of this call alone; at the end it is synced and renamed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(_TOKEN_BYTES)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path} ({nbytes / 1e6:.1f} MB): {error.strerror}"
        ) from error
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Remove the files that a killed process left in a folder under their temporary names.

    No other process may be writing to the folder.
    """
    for path in folder.glob("*." + "[0-9a-f]" * 2 * _TOKEN_BYTES + ".tmp"):
        path.unlink(missing_ok=True)
