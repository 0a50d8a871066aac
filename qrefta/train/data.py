"""A hub name, folder or file -> labelled text with a train and a test split, or batches of text to calibrate with."""

import copy
import csv
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import BatchEncoding, PreTrainedTokenizerBase

_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = (
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "test",
    "test-labeled",
)  # hub test splits may be unlabelled
_LABEL_NAMES = ("label", "labels", "target", "class")
_TEXT_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
    ("content",),
)


def load_classification(
    source: str | Path,
    *,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    header: list[str] | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> DatasetDict:
    """Labelled text with the splits train and test; columns text (and text_pair) and label, a `ClassLabel`.

    Args:
        source: a file (csv, tsv, json, jsonl, parquet), a folder with one file a split (`train.tsv`, `dev.tsv`), or
            the name of a data set on the hub; "name:config" picks a configuration ("nyu-mll/glue:sst2").
        text_columns: one column, or two for sentence pairs; None: found by their usual names, or the only one with
            text.
        label_column: None: found by its usual names.
        header: column names of a csv or tsv file that has no header line.
        test_share: rows put aside for testing where the source has a single split.
        seed: of that split.

    Raises:
        ValueError: if there is no such file, split or column, a split is empty, or labels are missing or unknown.
    """
    parts = read_splits(source, header)
    label_column = label_column or _find_label(parts["train"])
    text_columns = text_columns or _find_texts(parts["train"], label_column)
    if not 1 <= len(text_columns) <= 2:
        raise ValueError(
            f"text_columns is {text_columns}; give one column, or two for sentence pairs"
        )
    parts = DatasetDict(
        {name: _select(part, text_columns, label_column) for name, part in parts.items()}
    )
    return with_test(_encode_labels(parts), test_share, seed)


def read_splits(source: str | Path, header: list[str] | None = None) -> DatasetDict:
    """The rows of a file, folder or hub name (see `load_classification`), as train and, where there is one, test.

    Raises:
        ValueError: if there is no such file or split, or a split is empty.
    """
    return pick_splits(_read(source, header), source)


def pick_splits(splits: DatasetDict, source: str | Path) -> DatasetDict:
    """Of all splits the one to train on and, where there is one, the one to test on.

    Raises:
        ValueError: if one of them is empty.
    """
    train = _pick(splits, _TRAIN_NAMES) or next(iter(splits.values()))
    test = _pick(splits, _TEST_NAMES)
    if len(train) == 0 or (test is not None and len(test) == 0):
        raise ValueError(f"{source} has a split without rows.")
    return DatasetDict(train=train) if test is None else DatasetDict(train=train, test=test)


def with_test(parts: DatasetDict, test_share: float, seed: int) -> DatasetDict:
    """Train and test, with some of the training rows put aside where there is no test.

    Raises:
        ValueError: if there is one row only.
    """
    if "test" in parts:
        return parts
    if len(parts["train"]) < 2:
        raise ValueError("The data are one row; training and testing need at least one each.")
    return parts["train"].train_test_split(test_share, seed=seed)


def _read(source: str | Path, header: list[str] | None) -> DatasetDict:
    path = Path(source)
    if path.is_file():
        return _read_files({"train": path}, header)
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _BUILDERS}
        known = {name: file for name, file in files.items() if name in _TRAIN_NAMES + _TEST_NAMES}
        if not any(name in known for name in _TRAIN_NAMES):
            raise ValueError(
                f"{path} has no train file; it holds {sorted(f.name for f in path.iterdir())}, needed is "
                f"train{{{','.join(_BUILDERS)}}} and, better, one of {', '.join(_TEST_NAMES)}"
            )
        return _read_files(known, header)
    if path.suffix in _BUILDERS or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"There is no file or folder {source}.")
    name, _, config = str(source).partition(":")
    return load_dataset(name, config or None)


def _read_files(files: dict[str, Path], header: list[str] | None) -> DatasetDict:
    splits = DatasetDict()
    for name, file in files.items():
        builder = _BUILDERS.get(file.suffix)
        if builder is None:
            raise ValueError(
                f"{file} ends in {file.suffix!r}; it must be one of {', '.join(_BUILDERS)}"
            )
        options = {}
        if file.suffix == ".tsv":  # GLUE's files hold quotation marks that open no quotation
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if header is not None and builder == "csv":
            options["column_names"] = header
        splits[name] = load_dataset(builder, data_files=str(file), split="train", **options)
    return splits


def _pick(splits: DatasetDict, names: tuple[str, ...]) -> Dataset | None:
    return next((splits[name] for name in names if name in splits), None)


def _find_label(data: Dataset) -> str:
    found = next((name for name in _LABEL_NAMES if name in data.column_names), None)
    if found is None:
        raise ValueError(f"No label column among {data.column_names}; name it with label_column.")
    return found


def _find_texts(data: Dataset, label_column: str) -> list[str]:
    usual = next(
        (names for names in _TEXT_NAMES if all(name in data.column_names for name in names)), None
    )
    if usual is not None:
        return list(usual)
    textual = [name for name in data.column_names if _is_text(data, name) and name != label_column]
    if len(textual) != 1:
        raise ValueError(
            f"Which of the columns {data.column_names} is the text? Name it with text_columns."
        )
    return textual


def _is_text(data: Dataset, column: str) -> bool:
    feature = data.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _select(data: Dataset, text_columns: list[str], label_column: str) -> Dataset:
    missing = [name for name in [*text_columns, label_column] if name not in data.column_names]
    if missing:
        raise ValueError(f"There are no columns {missing}; the columns are {data.column_names}")
    names = dict(zip(text_columns, ("text", "text_pair"), strict=False)) | {label_column: "label"}
    data = data.select_columns(list(names)).rename_columns(
        {old: new for old, new in names.items() if old != new}
    )
    for name in ("text", "text_pair")[: len(text_columns)]:
        if not _is_text(data, name):
            raise ValueError(f"The column of {name} holds {data.features[name]}, not text.")
        if None in data.unique(name):
            raise ValueError(f"The column of {name} has rows without text.")
    return data


def _encode_labels(parts: DatasetDict) -> DatasetDict:
    """Labels as one `ClassLabel` for all splits, with the classes of the training split."""
    train = parts["train"]
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        classes, values = feature.names, {index: index for index in range(feature.num_classes)}
    else:
        found = train.unique("label")
        if (
            None in found
            or len(found) < 2
            or len(found) > 1000
            or any(isinstance(value, float) for value in found)
        ):
            raise ValueError(
                f"Labels must be 2 to 1000 classes without gaps; found {sorted(map(str, found))[:10]} ..."
            )
        ordered = sorted(found)
        classes, values = (
            [str(value) for value in ordered],
            {value: index for index, value in enumerate(ordered)},
        )
    for name, part in parts.items():
        unknown = [value for value in part.unique("label") if value not in values]
        if unknown:
            raise ValueError(
                f"The {name} split has labels {unknown[:5]} that are no class of training: {classes}"
            )
        encoded = [values[value] for value in part["label"]]
        parts[name] = (
            part.remove_columns("label")
            .add_column("label", encoded)
            .cast_column("label", ClassLabel(names=classes))
        )
    return parts


def read_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> list[BatchEncoding]:
    """Batches of tokenized text, padded on the right, texts of like length together.

    Args:
        source: a .txt file with one text a line, or csv, tsv, json, jsonl, parquet with a column of text: text,
            sentence or content, else the first that holds strings. Empty texts are left out.
        tokenizer: of the model; left as it is. One without a pad token pads with its end-of-text token.
        samples: texts taken; all, where there are fewer.
        max_length: tokens kept of a text, or fewer if the tokenizer's own limit is lower.
        batch_size: texts in a batch.
        seed: of the choice of texts.

    Raises:
        ValueError: if there is no such file, it has no text, or a number is less than 1.
    """
    if min(samples, max_length, batch_size) < 1:
        raise ValueError(
            f"samples, max_length, batch_size are {samples}, {max_length}, {batch_size}; each must be >= 1"
        )
    texts = _read_texts(Path(source))
    texts = sorted(random.Random(seed).sample(texts, min(samples, len(texts))), key=len)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer.pad_token is not None
    encode = partial(
        tokenizer,
        padding=padded,
        padding_side="right",
        truncation=True,
        max_length=min(max_length, tokenizer.model_max_length),
        return_tensors="pt",
    )
    size = batch_size if padded else 1
    return [encode(texts[start : start + size]) for start in range(0, len(texts), size)]


def _read_texts(path: Path) -> list[str]:
    """The texts of a file that are not empty."""
    if not path.is_file():
        raise ValueError(f"There is no file {path} to calibrate with.")
    texts: Iterable[str | None] = []
    if path.suffix == ".txt":
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    elif path.stat().st_size:  # datasets fails on a file of no bytes
        try:
            data = _read_files({"train": path}, None)["train"]
        except (
            ValueError,
            DatasetGenerationError,
        ) as error:  # a header alone is a ValueError of datasets
            raise ValueError(f"{path} cannot be read as a table with rows: {error}") from error
        texts = data[text_column(data, path)]
    found = [text.strip() for text in texts if text and text.strip()]
    if not found:
        raise ValueError(
            f"{path} holds no text; calibration needs some sentences like those the model will read."
        )
    return found


def text_column(data: Dataset, path: str | Path) -> str:
    """The column of text: by its usual name, else the first that holds strings."""
    textual = [name for name in data.column_names if _is_text(data, name)]
    if not textual:
        raise ValueError(f"{path} has no column of text; its columns are {data.features}")
    usual = [names[0] for names in _TEXT_NAMES if names[0] in textual and len(names) == 1]
    return (usual or textual)[0]
