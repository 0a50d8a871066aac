"""Whether a run that resumes is the run of its checkpoint: the same model, data and seed.

A checkpoint of another run would train too: with rows held out that it has learned already, or with
factors of another method that are left at their start.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from qrefta.files.json_file import read_json
from qrefta.hf_config import QReftaConfig
from qrefta.hf_quantizer import prepared_config

MARKS = "qrefta_run.json"  # in a checkpoint
_ROWS = 8  # of each split, from its start
_SETTINGS = ("method", "bits", "quant_type", "block_size", "double_quant", "transform")


def run_marks(train: Any, test: Any, arguments: TrainingArguments) -> dict[str, Any]:
    """The marks of a run's data: counts of rows, a checksum of the first ones, and the seed."""
    return {
        "training rows": _count(train),
        "test rows": _count(test),
        "first training rows": _checksum(train),
        "first test rows": _checksum(test),
        "seed": arguments.seed,
    }


def check_same_run(checkpoint: Path, marks: dict[str, Any]) -> None:
    """Refuse a checkpoint of other data or another seed; an older one without marks is taken.

    Raises:
        ValueError: naming the differences.
    """
    file = checkpoint / MARKS
    if not file.exists():
        return
    before = read_json(file)
    changed = [
        name if "first" in name else f"{name} {before[name]} -> {value}"
        for name, value in marks.items()
        if name in before and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run on other data or with another seed ({'; '.join(changed)}). "
            "Resume with the data and settings of that run, or start a new run in another folder, "
            "from the model of this one if you like."
        )


def check_same_model(checkpoint: Path, model: PreTrainedModel) -> None:
    """Refuse a checkpoint of a model that was prepared in another way.

    Raises:
        ValueError: naming the differences.
    """
    before = QReftaConfig.of(read_json(checkpoint / "config.json"))
    now = prepared_config(model)
    changed = [
        f"{name} {getattr(before.settings, name)} -> {getattr(now.settings, name)}"
        for name in _SETTINGS
        if getattr(before.settings, name) != getattr(now.settings, name)
    ]
    ranks = [{row.stack.name: row.rank for row in config.stacks} for config in (before, now)]
    if not changed and ranks[0] != ranks[1]:
        changed = ["the stacks' ranks"]
    if changed:
        raise ValueError(
            f"{checkpoint} is of a model that was prepared in another way ({'; '.join(changed)}). "
            "Resume with the model that the run began with, or give another output_dir."
        )


def _count(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def _checksum(rows: Any) -> int | None:
    """None for rows that are images, or not in order."""
    if not hasattr(rows, "__getitem__"):
        return None
    first = [rows[number] for number in range(min(_ROWS, len(rows)))]
    try:
        return zlib.crc32(json.dumps(first, sort_keys=True).encode())
    except TypeError:
        return None
