"""Folders to write: whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

CONFIGS = ("config.json", "adapter_config.json")  # without them a folder holds no model
LOCK = "qrefta_unfinished.lock"  # held by the process that writes to the folder
JOURNAL = "qrefta_unfinished.json"  # in a folder that a checkpoint is being prepared into


def check_new(out: str | Path, ignoring: Sequence[str] = ()) -> Path:
    """The path of a folder that is new or empty.

    Args:
        out: the folder.
        ignoring: patterns of names that may be there.

    Raises:
        ValueError: if it exists and is not empty.
    """
    out = Path(out)
    if out.exists():
        held = sorted(path.name for path in out.iterdir()) if out.is_dir() else ["it is a file"]
        held = [name for name in held if not any(fnmatch(name, pattern) for pattern in ignoring)]
        if held:
            raise ValueError(
                f"{out} exists and is not empty ({held[0]}); choose another folder or remove it."
            )
    return out


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this context no other process holds the folder, which is made if it is new.

    The system gives the lock back when a process is killed. Where a network mount has no locks,
    nothing is held.

    Raises:
        ValueError: if another process holds it.
        OSError: if it cannot be made or written to.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder} and holds {LOCK}; wait for it, or choose "
            "another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            why = f"cannot write to {folder}: {error.strerror}; make room or give write access"
            raise OSError(error.errno, why) from error
    try:
        yield
    finally:
        lock.release()
        if not (folder / JOURNAL).exists():
            (folder / LOCK).unlink(missing_ok=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write to, whose content gets the name `out` if all went well, and is removed
    otherwise.

    A new `out` appears in one step. A folder that exists may be a mount point, a link to another
    disk or the current folder, so it stays as it is: the content is written inside it under a
    temporary name, and moved up at the end, the config last. Without a config no loader takes the
    folder for a model.

    Raises:
        ValueError: if `out` exists and is not empty.
        OSError: if the content cannot get its name. Then it is kept, and the message names it.
    """
    out = check_new(out).resolve()
    place = out if out.exists() else out.parent
    folder = place / f".{out.name}-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        _publish(folder, out)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{out} cannot be written ({error.strerror}), and the files that were meant for it are "
            f"kept in {folder}; move them.",
        ) from error


def move_entries(folder: Path, out: Path) -> None:
    """Move all files and folders of `folder` into `out`, the config last; `folder` is removed."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in CONFIGS):
        if path.name in CONFIGS:
            sync_folder(out)  # the other names are on the disk first
        path.replace(out / path.name)
    sync_folder(out)
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, new names among them, are on the disk, where that is possible:
    Windows opens no folders, and some network file systems sync none.
    """
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _publish(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    temporary = f".{out.name}-"  # of this process, and of others that write to `out`
    held = sorted(path.name for path in out.iterdir() if not path.name.startswith(temporary))
    if held:
        raise FileExistsError(errno.EEXIST, f"it holds {held[0]} by now")
    move_entries(folder, out)
