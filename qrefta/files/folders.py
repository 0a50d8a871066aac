"""Folders to write: whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(out: str | Path) -> Path:
    """The path of a folder that is new or empty.

    Raises:
        ValueError: if it exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it.")
    return out


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write to, that gets the name `out` if all went well, and is removed otherwise.

    Raises:
        ValueError: if `out` exists and is not empty.
    """
    out = check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it readable for one user only
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
