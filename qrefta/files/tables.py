"""Files of text and tables -> a `datasets.DatasetDict`, and the columns that hold text."""

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
TEXT_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
    ("content",),
)


def read_files(files: dict[str, list[Path]], header: list[str] | None = None) -> DatasetDict:
    """The rows of the files of each split, in the order of the files.

    Args:
        files: name of a split -> its files, all of one kind.
        header: column names of csv and tsv files without a header line.

    Raises:
        ValueError: if the ending of a file is not one of `BUILDERS`, or not the same as that of the
            split's other files; or a file cannot be read.
    """
    splits = DatasetDict()
    for name, part in files.items():
        suffix = part[0].suffix
        builder = BUILDERS.get(suffix)
        if builder is None:
            raise ValueError(
                f"{part[0]} ends in {suffix!r}; it must be one of {', '.join(BUILDERS)}"
            )
        other = next((file for file in part if file.suffix != suffix), None)
        if other is not None:
            raise ValueError(
                f"{part[0]} and {other} are files of different kinds; put them in different folders"
            )
        options: dict[str, Any] = {}
        if suffix == ".tsv":  # GLUE's files hold quotation marks that open no quotation
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if header is not None and builder == "csv":
            options["column_names"] = header
        names = [str(file) for file in part]
        try:
            splits[name] = load_dataset(builder, data_files=names, split="train", **options)
        except (ValueError, DatasetGenerationError) as error:  # ValueError: a header without rows
            if suffix == ".jsonl":
                _check_lines(part)
            raise ValueError(f"{', '.join(names[:5])} cannot be read: {error}") from error
    return splits


def _check_lines(files: list[Path]) -> None:
    """Raise ValueError for the first line of JSON lines that is not JSON; it is named."""
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line)
                except ValueError as error:
                    if line.strip():
                        raise ValueError(f"{file}, row {number}, is not JSON: {error}") from error


def is_text(data: Dataset, column: str) -> bool:
    """Whether a column holds strings."""
    feature = data.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def text_column(data: Dataset, path: str | Path) -> str:
    """The column of text: the column with a usual name, else the first column of strings.

    Raises:
        ValueError: if no column holds strings; it names `path`.
    """
    textual = [name for name in data.column_names if is_text(data, name)]
    if not textual:
        raise ValueError(f"{path} has no column of text; its columns are {data.features}")
    for names in TEXT_NAMES:
        if len(names) == 1 and names[0] in textual:
            return names[0]
    return textual[0]
