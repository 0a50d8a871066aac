"""Whether the files of a prepared folder are as they were saved: layout, config.json, index and
weights.

Files of format version 2 carry checksums in their headers (`qrefta.files.checksums`). Folders of
version 1 may hold `qrefta_sha256.json`, a list of files with their sizes and SHA-256, which is
still read.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qrefta.files.checksums import Checksums, form_checksum, settings_checksum
from qrefta.files.header import read_checksums
from qrefta.files.json_file import read_json
from qrefta.files.layout import INDEX, SINGLE, read_index, weight_files
from qrefta.files.safetensors import Checkpoint
from qrefta.files.shards import copy_shard
from qrefta.files.whole_file import remove_temporary_files

LIST = "qrefta_sha256.json"  # of format version 1
SWITCH = "QREFTA_VERIFY"  # "0" loads without comparing checksums
_OFF = ("0", "false", "no", "off")
_LIST_FORMAT = 1
_FIX = (
    "copy the folder again from where it was saved. If you changed it on purpose, call "
    f"qrefta.files.verify.write_checksums on the folder; {SWITCH}=0 loads it unchecked."
)


def is_switched_off() -> bool:
    """Whether the environment says that checksums are not compared."""
    return os.environ.get(SWITCH, "").lower() in _OFF


def check_layout(folder: Path) -> None:
    """Refuse a folder with weights in both layouts, where transformers would load the single file.

    `save_pretrained` leaves one file from an earlier save where it now writes shards. The other way
    round it removes the shards and leaves their index, which then names no file and is ignored.

    Raises:
        ValueError: if there are one file and an index; it says which of them was saved with
            config.json, if their checksums tell that.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if not single.is_file() or not index.is_file():
        return
    shards = [folder / file for file in set(read_index(folder).values())]
    if not any(file.exists() for file in shards) and _saved_with_config(folder, [single]):
        return
    belong = [_saved_with_config(folder, [single]), _saved_with_config(folder, shards)]
    if belong.count(True) == 1:
        stale, kept = (INDEX, "the single file") if belong[0] else (SINGLE, "the shards")
        advice = f"Delete {stale}: by its checksum, config.json was saved with {kept}."
    else:
        older = SINGLE if single.stat().st_mtime_ns < index.stat().st_mtime_ns else INDEX
        advice = (
            f"{older} has the older date, which a copy may have changed; delete the save that you "
            "do not want."
        )
    raise ValueError(
        f"{folder} holds two saves: {SINGLE}, and shards with {INDEX}. {advice} (Without {SINGLE} "
        f"the shards are loaded, without {INDEX} the single file.)"
    )


def _saved_with_config(folder: Path, files: list[Path]) -> bool:
    """Whether a header of the files has the checksum of the folder's config.json."""
    try:
        config = settings_checksum(read_json(folder / "config.json"))
        headers = [read_checksums(file) for file in files]
    except ValueError:  # damaged, so it is not known
        return False
    return any(header is not None and header.config == config for header in headers)


def check_saved(files: Sequence[str | Path], version: int, listed: Path | None = None) -> None:
    """Refuse files that differ from those saved, in one pass over their bytes.

    Args:
        files: all files of weights that are to be loaded, in one folder.
        version: format version by config.json. From version 2 on every file must have checksums. A
            folder of version 1 without checksums and without a list loads with a warning.
        listed: the list of version 1, if it is not in the folder.

    Raises:
        ValueError: naming the file that differs, is left from another save, or has no checksums.
    """
    paths = [Path(file) for file in files]
    headers = {path: read_checksums(path) for path in paths}
    if any(headers.values()):
        _check_headers(headers)
        return
    folder = paths[0].parent
    if version > 1:
        raise ValueError(
            f"{paths[0]} has no checksums, but config.json says format version {version}, which "
            f"always has them: the file is of another save, or another program wrote it; {_FIX}"
        )
    listed = listed or folder / LIST
    if listed.is_file():
        _check_list(folder, paths, listed)
        return
    warnings.warn(
        f"{folder} has no checksums and no {LIST} (an older qrefta saved it), so damage to its "
        "files cannot be seen; save it again to write checksums.",
        stacklevel=2,
    )


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse settings (the content of config.json) that differ from those saved with a folder's
    weights.

    Folders without weights are passed over: loading them says which file is missing.

    Raises:
        ValueError: if they differ; if the folder holds two saves, it says so.
    """
    try:
        headers = [read_checksums(file) for file in weight_files(folder)]
    except ValueError:  # said by the check of the weights
        headers = []
    saved = {header.config for header in headers if header is not None}
    if not saved <= {None, settings_checksum(settings)}:
        check_layout(folder)
    for header in headers:
        if header is not None:
            _compare_settings(folder / "config.json", settings, header)
    if not any(headers) and (folder / LIST).is_file():
        _check_list(folder, [], folder / LIST)


def write_checksums(folder: str | Path) -> None:
    """Write the weights of a prepared folder again, with checksums of their present content and of
    the present config.json.

    Call it on a folder that was changed on purpose. It copies every file of weights once.

    Raises:
        ValueError: if the folder has no config.json or no weights.
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    remove_temporary_files(folder)
    config = settings_checksum(read_json(folder / "config.json"))
    for file in weight_files(folder):
        checkpoint = Checkpoint.of_files([file])
        copy_shard(file, checkpoint, checkpoint.names, Checksums({}, config))
    (folder / LIST).unlink(missing_ok=True)


def _check_headers(headers: dict[Path, Checksums | None]) -> None:
    known: dict[str, str | None] = {}
    for path, header in headers.items():
        if header is None:
            raise ValueError(
                f"{path} has no checksums, and other files of its folder have: it is left from "
                f"another save; {_FIX}"
            )
        for name, checksum in header.tensors.items():
            if known.setdefault(name, checksum) != checksum:
                raise ValueError(
                    f"{path} is of another save than {next(iter(headers))}, or damaged: their "
                    f"checksums of {name} differ; {_FIX}"
                )
    _check_config_and_index(headers)
    _check_tensors(list(headers), known)


def _check_config_and_index(headers: dict[Path, Checksums | None]) -> None:
    folder = next(iter(headers)).parent
    config = folder / "config.json"
    if not any(header is not None and header.config for header in headers.values()):
        raise ValueError(f"No file of {folder} has a checksum of config.json; {_FIX}")
    if config.is_file():
        settings = read_json(config)
        for header in headers.values():
            if header is not None:
                _compare_settings(config, settings, header)
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        _check_index(folder, list(headers))


def _compare_settings(config: Path, settings: dict[str, Any], header: Checksums) -> None:
    if header.config is not None and settings_checksum(settings) != header.config:
        raise ValueError(
            f"{config} differs from the one that was saved with the weights: its checksum is "
            f"{settings_checksum(settings)}, and {header.config} was saved. It is damaged, "
            f"changed, or of another save; {_FIX}"
        )


def _check_index(folder: Path, files: list[Path]) -> None:
    stored = {}
    for file in files:
        stored |= dict.fromkeys(Checkpoint.of_files([file]).names, file.name)
    indexed = read_index(folder)
    differing = sorted(
        name for name in stored.keys() | indexed.keys() if stored.get(name) != indexed.get(name)
    )
    if differing:
        raise ValueError(
            f"{folder / INDEX} is damaged: it places {differing[0]} in "
            f"{indexed.get(differing[0])}, and it is in {stored.get(differing[0])}; {_FIX}"
        )


def _check_tensors(files: list[Path], known: dict[str, str | None]) -> None:
    """Compare every tensor with its checksum: dtypes and shapes first, then bytes.

    Several tensors at once, since reading and CRC-32 leave the interpreter free.
    """
    jobs = []
    for file in files:
        checkpoint = Checkpoint.of_files([file])
        for name in checkpoint.names:
            if name not in known:
                raise ValueError(
                    f"{file} holds {name}, for which no checksum was saved: it is damaged, or "
                    f"another program wrote it; {_FIX}"
                )
            saved = known[name]
            if saved is not None:
                form = form_checksum(checkpoint.dtype(name), checkpoint.shape(name))
                if not saved.startswith(form):
                    raise ValueError(
                        f"{file} is damaged: {name} is {checkpoint.dtype(name)} of shape "
                        f"{list(checkpoint.shape(name))}, and by its checksum it was saved as "
                        f"another; {_FIX}"
                    )
                jobs.append((file, checkpoint, name, saved))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checksums = pool.map(lambda job: job[1].checksum(job[2]), jobs)
        for (file, _, name, saved), checksum in zip(jobs, checksums, strict=True):
            if checksum != saved:
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(
                    f"{file} is damaged: the checksum of {name} is {checksum}, and {saved} was "
                    f"saved; {_FIX}"
                )


def _check_list(folder: Path, weights: Iterable[Path], listed: Path) -> None:
    """Compare a folder of version 1 with its list: sizes first, then SHA-256."""
    entries = _entries(listed)
    files = [folder / name for name in entries if name.endswith(".json")] + list(weights)
    for path in files:
        entry = entries.get(path.name)
        if entry is None:
            raise ValueError(
                f"{path} is not in {listed.name}: it is left from another save; {_FIX}"
            )
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {listed.name} lists it; {_FIX}")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, and {entry['bytes']} were saved; {_FIX}"
            )
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, files))
    for path, digest in zip(files, digests, strict=True):
        if digest != entries[path.name]["sha256"]:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is not the one in {listed.name}; {_FIX}"
            )


def _entries(listed: Path) -> dict[str, dict[str, Any]]:
    """The list's entries, by file name.

    Raises:
        ValueError: if the list is damaged, or from a newer version.
    """
    content = read_json(listed)
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > _LIST_FORMAT:
        raise ValueError(
            f"{listed} has format {number}; this package reads {_LIST_FORMAT}. Update it: pip "
            "install -U qrefta"
        )
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError(f"{listed} is damaged: it lists no files with bytes and sha256; {_FIX}")
    if "config.json" not in files:
        raise ValueError(f"{listed} is damaged: it lists no files such as config.json; {_FIX}")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return (
        Path(name).name == name and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
