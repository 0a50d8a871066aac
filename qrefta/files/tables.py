"""Files of text and tables -> a `datasets.DatasetDict`, and the columns that hold text."""

import glob
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from qrefta.files.csv_file import csv_rows
from qrefta.files.encodings import check_text, text_encoding

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
_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")
_SHOWN = 60  # characters of a line, in an error


def kind_of(path: Path) -> str:
    """The ending of a file's name in small letters."""
    return path.suffix.lower()


def read_files(files: dict[str, list[Path]], header: list[str] | None = None) -> DatasetDict:
    """The rows of the files of each split, in the order of the files.

    Args:
        files: name of a split -> its files, all of one kind.
        header: column names of csv and tsv files without a header line.

    Raises:
        ValueError: if the ending of a file is not one of `BUILDERS`, or differs between the files
            of a split; or a file cannot be read or has no rows.
    """
    splits = DatasetDict()
    for name, part in files.items():
        kind = kind_of(part[0])
        if kind not in BUILDERS:
            raise ValueError(
                f"{part[0]} ends in {part[0].suffix!r}; it must be one of {', '.join(BUILDERS)}"
            )
        other = next((file for file in part if kind_of(file) != kind), None)
        if other is not None:
            raise ValueError(
                f"{part[0]} and {other} are files of different kinds; put them in different folders"
            )
        empty = next((file for file in part if not file.stat().st_size), None)
        if empty is not None:
            raise ValueError(f"{empty} is empty; give a file with rows.")
        if BUILDERS[kind] == "csv":
            splits[name] = _read_csv(part, header)
        else:
            splits[name] = _load(part, BUILDERS[kind])
        if len(splits[name]) == 0:
            raise ValueError(f"{part[0]} has no rows.")
    return splits


def _read_csv(files: list[Path], header: list[str] | None) -> Dataset:
    """The rows of tables; every column holds text."""
    # as tuples: of a list, datasets makes shards
    arguments = {"files": versions(files), "header": None if header is None else tuple(header)}
    first = next(_csv_rows(**arguments), {})
    features = Features({name: Value("string") for name in first})
    return from_generator(_csv_rows, features, **arguments)


def from_generator(make: Any, features: Features, **arguments: Any) -> Dataset:
    """The rows of a generator, written to the disk as they come; its ValueErrors come through."""
    if next(make(**arguments), None) is None:  # datasets fails without rows
        return Dataset.from_dict({name: [] for name in features}, features)
    try:
        return Dataset.from_generator(make, features, gen_kwargs=arguments)  # type: ignore[return-value]
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def versions(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    """Names with size and time of change, so that a changed file is not taken for its old content
    by the cache of `datasets`.
    """
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _csv_rows(
    files: tuple[tuple[str, int, int], ...], header: tuple[str, ...] | None
) -> Iterator[dict[str, Any]]:
    """The rows of several tables with the same columns."""
    columns: list[str] = []
    for name, *_ in files:
        for row in csv_rows(name, None if header is None else list(header)):
            columns = columns or [*row]
            if columns != [*row]:
                raise ValueError(
                    f"{name} has the columns {[*row]}, and {files[0][0]} {columns}; put them in "
                    "different folders, or give them the same columns."
                )
            yield row


def _load(files: list[Path], builder: str, **options: Any) -> Dataset:
    """The rows of files by a builder of `datasets`."""
    names = [str(file) for file in files]
    patterns = [glob.escape(name) for name in names]  # datasets reads [, * and ? as patterns
    if builder == "json":
        _check_utf8(files)
    try:
        data: Any = load_dataset(builder, data_files=patterns, split="train", **options)
    except (ValueError, DatasetGenerationError) as error:  # ValueError: a header without rows
        for file in files:
            if kind_of(file) == ".jsonl":
                _check_lines(file)
        reason = error.__cause__ or error
        raise ValueError(f"{', '.join(names[:5])} cannot be read: {reason}") from error
    if builder == "json" and len(data) == 1 and "field" not in options:
        field = _field_of_rows(data)
        if field is not None:
            return _load(files, builder, field=field)
    return data


def _check_utf8(files: list[Path]) -> None:
    """Refuse other encodings, of which pyarrow reads some JSON without an error."""
    for file in files:
        check_text(file)
        encoding = text_encoding(file)
        if encoding != "utf-8-sig":
            raise ValueError(
                f"{file} is text in {encoding.upper()}, and JSON is read in UTF-8. Convert it: "
                f"iconv -f {encoding} -t utf-8 OLD > NEW"
            )


def _field_of_rows(data: Dataset) -> str | None:
    """The entry that holds the rows of a JSON file: of {"data": [{...}, {...}]} it is data."""
    row = data[0]
    if any(name in row for name in _TURNS):
        return None
    lists = [
        name
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return lists[0] if len(lists) == 1 else None


def _check_lines(file: Path) -> None:
    """Raise ValueError for the first line of JSON lines that is no JSON object; it is named."""
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            shown = f"{file}, row {number}"
            try:
                found = json.loads(line) if line.strip() else {}
            except ValueError as error:
                shown = f"{shown}, is not JSON: {error}, in {line.strip()[:_SHOWN]!r}."
                raise ValueError(
                    f"{shown} A line is one object in braces, without a comma behind it."
                ) from error
            if not isinstance(found, dict):
                raise ValueError(f"{shown}, is {line.strip()[:_SHOWN]!r}; it must be an object.")


def without_added_nulls(row: dict[str, Any], features: Features) -> dict[str, Any]:
    """A row without the keys that Arrow added: its structs have all keys of all rows, with None.

    Nulls of JSON stay, also within a struct.
    """
    return {name: _without_nulls(value, features.get(name)) for name, value in row.items()}


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            name: _without_nulls(one, feature[name])
            for name, one in value.items()
            if one is not None
        }
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        return [_without_nulls(one, feature.feature) for one in value]
    return value


def is_text(data: Dataset, column: str) -> bool:
    """Whether a column holds strings."""
    feature = data.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def is_number(data: Dataset, column: str) -> bool:
    """Whether the strings of a column are numbers, such as an index in a csv file."""
    try:
        data.data.column(column).cast(pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def find_column(data: Dataset, name: str) -> str | None:
    """The column of this name; capital letters and spaces around it do not count, unless two
    columns differ in them only.
    """
    if name in data.column_names:
        return name
    alike = [one for one in data.column_names if one.strip().lower() == name.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def with_names(data: Dataset, names: tuple[str, ...]) -> Dataset:
    """The data with columns such as "Messages" renamed to a name of `names`."""
    found = {}
    for name in names:
        column = find_column(data, name)
        if column is not None and column != name:
            found[column] = name
    return data.rename_columns(found)


def text_columns(data: Dataset) -> list[str]:
    """The columns of strings that are not all numbers."""
    columns = data.column_names
    return [name for name in columns if is_text(data, name) and not is_number(data, name)]


def text_column(data: Dataset, path: str | Path, name: str | None = None) -> str:
    """The column of text: `name`, or else the column with a usual name, or else the first column of
    strings, with a warning if there are several.

    Raises:
        ValueError: if there is no column `name`, or no column holds strings; it names `path`.
    """
    if name is not None:
        found = find_column(data, name)
        if found is None:
            raise ValueError(
                f"There is no column {name!r} in {path}; the columns are {data.column_names}"
            )
        return found
    for names in TEXT_NAMES:
        found = find_column(data, names[0])
        if len(names) == 1 and found is not None and is_text(data, found):
            return found
    textual = text_columns(data)
    if not textual:
        raise ValueError(f"{path} has no column of text; its columns are {data.features}")
    if len(textual) > 1:
        warnings.warn(
            f"Of {path} the column {textual[0]!r} is read. To read another one of {textual[1:]}, "
            "rename it to text.",
            stacklevel=3,
        )
    return textual[0]
