"""The SHA-256 of every file of a prepared folder: written when it is saved, checked before a tensor of it is read.

`qrefta_sha256.json` lists config.json, the weights and their index, each with its bytes and digest. It finds damage (a
flipped bit, half a copy, files of two saves side by side), not malice: who can change a weight can change the list.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qrefta._compat.transformers import before_upload, has_peft_adapter
from qrefta.files.safetensors import INDEX, SINGLE, read_json, replace_text

DIGESTS = "qrefta_sha256.json"
SWITCH = "QREFTA_VERIFY"  # "0" loads without checking
_WEIGHTS = "model*.safetensors"
_FORMAT = 1
_OFF = ("0", "false", "no", "off")


def write_digests(folder: str | Path) -> None:
    """Write the list for the files that a folder holds now, in one pass over their bytes; nothing without weights.

    Call it on a folder whose files were changed on purpose.

    Raises:
        OSError: if a file cannot be read, or the list not be written.
    """
    folder = Path(folder)
    found = {
        pattern: sorted(folder.glob(pattern))
        for pattern in ("config.json", "model*.index*.json", _WEIGHTS)
    }
    files = [path for paths in found.values() for path in paths if path.is_file()]
    if any(map(Path.is_file, found[_WEIGHTS])):
        digests = zip(files, _digests(files), strict=True)
        entries = {
            path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in digests
        }
        replace_text(folder / DIGESTS, json.dumps({"format": _FORMAT, "files": entries}, indent=2))


def check_digests(folder: Path, weights: Iterable[str | Path], listed: Path | None = None) -> None:
    """Raise unless a folder's config, its index, and the weights that are to be loaded are what was saved.

    Sizes are compared first, then digests, in one pass over the bytes. Older folders have no list: they load with a
    warning. `QREFTA_VERIFY=0` in the environment leaves all of it out.

    Args:
        folder: of a prepared model.
        weights: files that are to be loaded from it.
        listed: the list; default: the folder's own.

    Raises:
        ValueError: if a file differs from its entry or has none, or the list is damaged.
    """
    if os.environ.get(SWITCH, "").lower() in _OFF:
        return
    listed = listed or folder / DIGESTS
    if not listed.is_file():
        warnings.warn(
            f"{folder} has no {DIGESTS} (an older qrefta saved it), so damage to its files cannot be seen; save it "
            "again to write one.",
            stacklevel=2,
        )
        return
    entries = _entries(listed)
    mend = (
        "copy it again from where it was saved. If it was changed on purpose, call qrefta.files.checksums.write_digests on the "
        f"folder; {SWITCH}=0 loads it unchecked."
    )
    files = [folder / name for name in entries if name.endswith(".json")] + [
        Path(file) for file in weights
    ]
    for path in files:
        entry = entries.get(path.name)
        if entry is None:
            raise ValueError(
                f"{path} is not in {listed.name}: it is left from another save; {mend}"
            )
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {listed.name} says was saved; {mend}")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, and {entry['bytes']} were saved; {mend}"
            )
    for path, digest in zip(files, _digests(files), strict=True):
        if digest != entries[path.name]["sha256"]:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is not the one in {listed.name}; {mend}"
            )


def save_with_digests(is_prepared: Callable[[PreTrainedModel], bool]) -> None:
    """Let `save_pretrained` of the models that `is_prepared` tells, and what they upload, end with the list.

    transformers has no place for it, so its base class's methods are wrapped, once; other models only take away the
    list of a model that they replace. A method of the model itself would be a reference in a circle, which keeps a
    model's memory when it is deleted.
    """
    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        folder = Path(save_directory)
        before = _states(folder)
        save(self, save_directory, is_main_process, *args, **kwargs)
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        adapter_alone = has_peft_adapter(self)
        if saves and not adapter_alone:
            if is_prepared(self):
                _remove_replaced(folder, before)
                write_digests(folder)
            else:  # a dense model in a prepared one's place
                (folder / DIGESTS).unlink(missing_ok=True)

    def write_list(model: PreTrainedModel, folder: str | Path) -> None:
        if is_prepared(model):
            write_digests(folder)

    before_upload(write_list)
    PreTrainedModel.save_pretrained = save_pretrained


def _states(folder: Path) -> dict[str, Any]:
    """What changes when a file is written, of the two files that say where the weights are."""
    states = {name: (folder / name).stat() for name in (SINGLE, INDEX) if (folder / name).is_file()}
    return {
        name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states.items()
    }


def _remove_replaced(folder: Path, before: dict[str, Any]) -> None:
    """Remove the weights of an earlier save in the other layout, one file or shards, which transformers leaves.

    It loads the one file where there are both: after saving shards over it, the old weights.
    """
    after = _states(folder)
    written = {name for name, state in after.items() if before.get(name) != state}
    if len(after) == 2 and written == {INDEX}:
        (folder / SINGLE).unlink()
    elif len(after) == 2 and written == {SINGLE}:
        (folder / INDEX).unlink()


def _entries(listed: Path) -> dict[str, dict[str, Any]]:
    """Name -> bytes and digest.

    Raises:
        ValueError: if the list is no such thing.
    """
    content = read_json(listed)
    if (
        isinstance(content, dict)
        and isinstance(content.get("format"), int)
        and content["format"] > _FORMAT
    ):
        raise ValueError(
            f"{listed} has format {content['format']}; this package reads {_FORMAT}. Update it: pip install -U qrefta"
        )
    files = content.get("files") if isinstance(content, dict) else None
    if (
        not isinstance(files, dict)
        or not all(map(_is_entry, files.items()))
        or "config.json" not in files
    ):
        raise ValueError(
            f"{listed} is damaged: it lists no files with their bytes and sha256; copy it again, or call "
            "qrefta.files.checksums.write_digests on a folder that is known to be good."
        )
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    return (
        Path(name).name == name and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
    )


def _digests(files: list[Path]) -> list[str]:
    """Several files at once: hashing leaves the interpreter to the others, and one core does 0.2 to 2 GB a second."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, files))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
