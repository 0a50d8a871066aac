"""The files of a model's weights in its folder: one file, or shards with an index."""

import os
from pathlib import Path

from qrefta.files.json_file import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights.

    Raises:
        ValueError: if there are none, or the index is damaged.
    """
    return [folder / file for file in shards_of(folder)]


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files directly in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def shards_of(folder: Path) -> dict[str, list[str] | None]:
    """File names, each with the tensors to take from it; None: all. As in transformers, one file
    goes before an index.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        return _indexed(folder)
    others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX} (.bin files: {others}); save the model with "
        "save_pretrained first, or load it and prepare it in memory."
    )


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the folder's index.

    Raises:
        ValueError: if the index is damaged.
    """
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(
            f"{folder / INDEX} is damaged: it has no weight_map of tensors and files; copy it "
            "again."
        )
    return weight_map


def _indexed(folder: Path) -> dict[str, list[str] | None]:
    names: dict[str, list[str]] = {}
    for name, file in read_index(folder).items():
        names.setdefault(file, []).append(name)
    for file in names:
        if Path(file).name != file:
            raise ValueError(
                f"{folder / INDEX} names {file!r}, which is outside its folder; it is refused."
            )
        if not os.path.isfile(folder / file):
            raise ValueError(
                f"{folder / INDEX} names {file}, which is missing; copy it into {folder}."
            )
    return dict(names)
