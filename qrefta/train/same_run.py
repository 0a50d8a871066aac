"""Whether a run that resumes is the run of its checkpoint: the same model, data and seed.

A checkpoint of another run would train too: with rows held out that it has learned already, or with
factors of another method that are left at their start.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from qrefta.files.json_file import read_json
from qrefta.model.prepared import is_prepared, prepared_config

MARKS = "qrefta_run.json"  # in a checkpoint
_ROWS = 8  # of each split, from its start
_SETTINGS = ("method", "bits", "quant_type", "block_size", "double_quant", "transform")


def run_marks(
    model: nn.Module, train: Any, test: Any, arguments: TrainingArguments
) -> dict[str, Any]:
    """The marks of a run: how its model was prepared, counts of its rows, a checksum of the first
    ones, and the seed.
    """
    marks: dict[str, Any] = {
        "training rows": _count(train),
        "test rows": _count(test),
        "first training rows": _checksum(train),
        "first test rows": _checksum(test),
        "seed": arguments.seed,
    }
    if is_prepared(model):
        config = prepared_config(model)
        marks |= {name: getattr(config.settings, name) for name in _SETTINGS}
        marks["ranks"] = json.dumps([row.rank for row in config.stacks])
        marks["formats"] = json.dumps([row.quant_type for row in config.stacks])
    return marks


def check_same_run(checkpoint: Path, marks: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run; an older one without marks is taken.

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
            f"{checkpoint} is of a run with other data, another seed or another model "
            f"({'; '.join(changed)}). Resume with the data, seed and model of that run, or "
            "start a new run in another folder, from the model of this one if you like."
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
