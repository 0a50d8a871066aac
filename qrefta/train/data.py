"""Data from a hub name, folder or file: the splits train and test, of labelled text or any rows."""

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from qrefta.files.tables import BUILDERS, TEXT_NAMES, is_text, read_files

_TRAIN_NAMES = ("train", "training")
# validation first, since test splits on the hub may be unlabelled
_TEST_NAMES = ("validation", "valid", "val", "dev", "eval", "test", "test-labeled")
_LABEL_NAMES = ("label", "labels", "target", "class")


def load_classification(
    source: str | Path,
    *,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    header: list[str] | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> DatasetDict:
    """Labelled text with the splits train and test.

    The columns are text (and text_pair) and label, a `ClassLabel`.

    Args:
        source: a file (csv, tsv, json, jsonl, parquet), a folder with one file a split
            (`train.tsv`, `dev.tsv`), or the name of a data set on the hub; "name:config" picks a
            configuration ("nyu-mll/glue:sst2").
        text_columns: one column, or two for sentence pairs; None: columns with a usual name, else
            the only column with text.
        label_column: None: the column with a usual name.
        header: column names of a csv or tsv file without a header line.
        test_share: share of the rows for testing, if the source has a single split.
        seed: of the choice of these rows.

    Raises:
        ValueError: if a file, split, column or label is missing, a split is empty, or a test label
            is unknown.
    """
    parts = read_splits(source, header)
    label_column = label_column or _find_label(parts["train"])
    text_columns = text_columns or _find_texts(parts["train"], label_column)
    if not 1 <= len(text_columns) <= 2:
        raise ValueError(
            f"text_columns is {text_columns}; give one column, or two for sentence pairs"
        )
    for name, part in parts.items():
        parts[name] = _select(part, text_columns, label_column)
    return with_test(_encode_labels(parts), test_share, seed)


def read_splits(
    source: str | Path, header: list[str] | None = None, shards: bool = False
) -> DatasetDict:
    """The rows of a file, folder or hub name as train and, if the source has it, test.

    Args:
        source: as for `load_classification`.
        header: column names of a csv or tsv file without a header line.
        shards: a folder without a train file is a split train with all files below it.

    Raises:
        ValueError: if a file or split is missing, or a split is empty.
    """
    files = split_files(source, shards)
    if files:
        return pick_splits(read_files(files, header), source)
    name, _, config = str(source).partition(":")
    return pick_splits(load_dataset(name, config or None), source)


def pick_splits(splits: DatasetDict, source: str | Path) -> DatasetDict:
    """The split to train on and, if there is one, the split to test on.

    Raises:
        ValueError: if one of them is empty.
    """
    train = _pick(splits, _TRAIN_NAMES) or next(iter(splits.values()))
    picked = DatasetDict({"train": train})
    test = _pick(splits, _TEST_NAMES)
    if test is not None:
        picked["test"] = test
    if any(len(part) == 0 for part in picked.values()):
        raise ValueError(f"{source} has a split without rows.")
    return picked


def with_test(parts: DatasetDict, test_share: float, seed: int) -> DatasetDict:
    """The splits train and test; without a test split some training rows become it.

    Raises:
        ValueError: if there is one row only.
    """
    if "test" in parts:
        return parts
    if len(parts["train"]) < 2:
        raise ValueError("The data have one row; training and testing need at least one row each.")
    return parts["train"].train_test_split(test_share, seed=seed)


def split_files(source: str | Path, shards: bool = False) -> dict[str, list[Path]]:
    """The files of the splits train and test of a file or folder; none for a name on the hub.

    Args:
        source: a file, which is the split train, a folder, or a hub name.
        shards: a folder without a train file is a split train with all files below it.

    Raises:
        ValueError: if the file or folder is missing, or has no file that can be read.
    """
    path = Path(source)
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        if path.suffix in BUILDERS or path.is_absolute() or str(source).startswith("."):
            raise ValueError(f"There is no file or folder {source}.")
        return {}
    named = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in BUILDERS}
    train = next((named[name] for name in _TRAIN_NAMES if name in named), None)
    test = next((named[name] for name in _TEST_NAMES if name in named), None)
    if train is not None:
        return {"train": [train]} | ({} if test is None else {"test": [test]})
    below = [file for file in sorted(path.rglob("*")) if file.suffix in BUILDERS]
    if shards and below:
        return {"train": below}
    raise ValueError(
        f"{path} has no train file; it holds {sorted(file.name for file in path.iterdir())}, "
        f"needed is train{{{','.join(BUILDERS)}}} and, better, one of {', '.join(_TEST_NAMES)}"
    )


def _pick(splits: DatasetDict, names: tuple[str, ...]) -> Dataset | None:
    return next((splits[name] for name in names if name in splits), None)


def _find_label(data: Dataset) -> str:
    for name in _LABEL_NAMES:
        if name in data.column_names:
            return name
    raise ValueError(
        f"No label column among {data.column_names}; name it with label_column, or choose another "
        "task: lm for running text, sft for conversations."
    )


def _find_texts(data: Dataset, label_column: str) -> list[str]:
    for names in TEXT_NAMES:
        if all(name in data.column_names for name in names):
            return list(names)
    textual = [name for name in data.column_names if is_text(data, name) and name != label_column]
    if len(textual) != 1:
        raise ValueError(
            f"Which of the columns {data.column_names} is the text? Name it with text_columns."
        )
    return textual


def _select(data: Dataset, text_columns: list[str], label_column: str) -> Dataset:
    missing = [name for name in [*text_columns, label_column] if name not in data.column_names]
    if missing:
        raise ValueError(f"There are no columns {missing}; the columns are {data.column_names}")
    names = dict(zip(text_columns, ("text", "text_pair"), strict=False)) | {label_column: "label"}
    data = data.select_columns(list(names)).rename_columns(
        {old: new for old, new in names.items() if old != new}
    )
    for name in ("text", "text_pair")[: len(text_columns)]:
        if not is_text(data, name):
            raise ValueError(f"The column of {name} holds {data.features[name]}, not text.")
        if None in data.unique(name):
            raise ValueError(f"The column of {name} has rows without text.")
    return data


def _encode_labels(parts: DatasetDict) -> DatasetDict:
    """Labels as one `ClassLabel` for all splits, with the classes of the training split."""
    feature = parts["train"].features["label"]
    if isinstance(feature, ClassLabel):
        classes = feature.names
        index_of: dict[Any, int] = {index: index for index in range(len(classes))}
    else:
        values = _classes(parts["train"].unique("label"))
        classes = [str(value) for value in values]
        index_of = {value: index for index, value in enumerate(values)}
    for name, part in parts.items():
        unknown = [value for value in part.unique("label") if value not in index_of]
        if unknown:
            raise ValueError(
                f"The {name} split has labels {unknown[:5]} that are no class of training: "
                f"{classes}"
            )
        encoded = [index_of[value] for value in part["label"]]
        part = part.remove_columns("label").add_column("label", encoded)
        parts[name] = part.cast_column("label", ClassLabel(names=classes))
    return parts


def _classes(values: list[Any]) -> list[Any]:
    """The values of a label column in order."""
    is_gap_or_number = any(value is None or isinstance(value, float) for value in values)
    if is_gap_or_number or not 2 <= len(values) <= 1000:
        raise ValueError(
            "Labels must be 2 to 1000 classes without gaps; found "
            f"{sorted(map(str, values))[:10]} ..."
        )
    return sorted(values)
