"""Files of text and tables -> a `datasets.DatasetDict`, and the columns that hold text."""

import csv
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset

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


def read_files(files: dict[str, Path], header: list[str] | None = None) -> DatasetDict:
    """The rows of each file, by the name of its split.

    Args:
        files: name of a split -> its file.
        header: column names of csv and tsv files without a header line.

    Raises:
        ValueError: if the ending of a file is not one of `BUILDERS`.
    """
    splits = DatasetDict()
    for name, file in files.items():
        builder = BUILDERS.get(file.suffix)
        if builder is None:
            raise ValueError(
                f"{file} ends in {file.suffix!r}; it must be one of {', '.join(BUILDERS)}"
            )
        options: dict[str, Any] = {}
        if file.suffix == ".tsv":  # GLUE's files hold quotation marks that open no quotation
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if header is not None and builder == "csv":
            options["column_names"] = header
        splits[name] = load_dataset(builder, data_files=str(file), split="train", **options)
    return splits


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
