"""Data from a hub name, folder or file: the splits train and test, of labelled text or any rows."""

import glob
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from datasets import Dataset, DatasetDict, Features, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from qrefta.choices import Task
from qrefta.files.tables import (
    BUILDERS,
    TEXT_NAMES,
    find_column,
    is_text,
    kind_of,
    read_files,
)
from qrefta.files.tables import (
    text_columns as columns_of_text,
)
from qrefta.train.labels import encode_labels

TEST_SHARE = 0.1  # of the rows of a source without a test split
TRAIN_NAMES = ("train", "training")
# validation first, since test splits on the hub may be unlabelled
TEST_NAMES = (
    *("validation", "valid", "val", "dev", "eval", "evaluation"),
    *("test", "testing", "test-labeled"),
)
# what follows a split's name where it has several files: train-00000-of-00001, then maybe a hash
_PART = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?")
_LABEL_NAMES = ("label", "labels", "target", "class")


class Loaded(DatasetDict):
    """The splits train and maybe test with the columns of a task, which `finetune` takes as they
    are while they have these columns.

    Attributes:
        task: that reads the columns.
        columns: features by split.
    """

    task: Task
    columns: dict[str, Features]

    @classmethod
    def of(cls, parts: DatasetDict, task: Task) -> Self:
        """Splits with the columns of a task."""
        loaded = cls(parts)
        loaded.task = task
        loaded.columns = {str(name): part.features for name, part in parts.items()}
        return loaded

    def fits(self, task: Task) -> bool:
        """Whether the splits still have the columns of a task."""
        now = {str(name): part.features for name, part in self.items()}
        return self.task == task and now == self.columns


def load_classification(
    source: str | Path,
    *,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    header: list[str] | None = None,
    test_share: float = TEST_SHARE,
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
    return labelled_texts(parts, str(source), seed, text_columns, label_column, test_share)


def labelled_texts(
    parts: DatasetDict,
    source: str,
    seed: int,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    test_share: float = TEST_SHARE,
) -> Loaded:
    """The splits of `load_classification`, from splits with other columns.

    Args:
        parts: the split train and maybe test.
        source: name of the data, for errors.
        seed, text_columns, label_column, test_share: as for `load_classification`.

    Raises:
        ValueError: as `load_classification`.
    """
    if label_column is None:
        label_column = _find_label(parts["train"])
    text_columns = text_columns or _find_texts(parts["train"], label_column)
    if not 1 <= len(text_columns) <= 2:
        raise ValueError(
            f"text_columns is {text_columns}; give one column, or two for sentence pairs"
        )
    for name, part in parts.items():
        parts[name] = _select(part, text_columns, label_column, f"{source} ({name})")
    return with_test(encode_labels(parts, source, label_column), "classify", seed, test_share)


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
    if is_saved(Path(source)):
        saved = load_from_disk(str(source))
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        return pick_splits(splits, source)
    name, _, config = str(source).partition(":")
    try:
        return pick_splits(load_dataset(name, config or None), source)
    except (ConnectionError, FileNotFoundError, DatasetGenerationError) as error:
        raise ValueError(
            f"There is no file or folder {source}, and as a data set of the hub it cannot be read: "
            f"{error.__cause__ or error}"
        ) from error


def pick_splits(splits: DatasetDict, source: str | Path) -> DatasetDict:
    """The split to train on and, if there is another one, the split to test on, with the rows as
    they are stored.

    Without a split train, the first split that is not for testing is trained on, or else the first;
    a warning names it.

    Raises:
        ValueError: if there is no split, one of them is empty or streamed, or its rows pass through
            a function when they are read.
    """
    if not splits:
        raise ValueError(f"{source} has no splits; needed are train and, better, test.")
    train = _pick(splits, TRAIN_NAMES)
    if train is None:
        train = next((name for name in splits if name not in TEST_NAMES), next(iter(splits)))
    test = _pick({name: part for name, part in splits.items() if name != train}, TEST_NAMES)
    if train not in TRAIN_NAMES:
        tested = "rows of it are held out" if test is None else f"{test!r} is used"
        warnings.warn(
            f"{source} has no split train, but {', '.join(map(str, splits))}. {train!r} is trained "
            f"on, and {tested} for testing.",
            stacklevel=4,
        )
    picked = DatasetDict({"train": splits[train]})
    if test is not None:
        picked["test"] = splits[test]
    for name, part in picked.items():
        if not isinstance(part, Dataset):
            raise ValueError(
                f"{source} ({name}) is a {type(part).__name__}, whose rows have no number; save "
                "them to a file, or make a Dataset of them: Dataset.from_generator."
            )
        if len(part) == 0:
            raise ValueError(f"{source} has a split without rows.")
        if part.format["type"] == "custom":
            raise ValueError(
                f"{source} ({name}) has a transform (set_transform), which would be lost; apply it "
                "with map, or leave it out."
            )
    return picked.with_format(None)


def with_test(parts: DatasetDict, task: Task, seed: int, test_share: float = TEST_SHARE) -> Loaded:
    """The splits train and test; without a test split some training rows become it.

    Raises:
        ValueError: if there is one row only.
    """
    if "test" in parts:
        return Loaded.of(parts, task)
    if len(parts["train"]) < 2:
        raise ValueError("The data have one row; training and testing need at least one row each.")
    return Loaded.of(parts["train"].train_test_split(test_share, seed=seed), task)


def split_files(source: str | Path, shards: bool = False) -> dict[str, list[Path]]:
    """The files of the splits train and test of a file or folder; none for a name on the hub and
    for a folder that `save_to_disk` wrote.

    A split is a file with its name, or several with numbers behind it (train-00000-of-00002).

    Args:
        source: a file, which is the split train, a folder, or a hub name.
        shards: a folder without a train file is a split train with all files below it; files and
            subfolders that have the name of a test split are the split test.

    Raises:
        ValueError: if the file or folder is missing, or has no file that can be read; if a folder
            has a file for testing and none for training.
    """
    path = Path(source)
    if path.is_file():
        return {"train": [path]}
    if is_saved(path):
        return {}
    if not path.is_dir():
        if kind_of(path) in BUILDERS or path.is_absolute() or str(source).startswith("."):
            raise ValueError(f"There is no file or folder {source}.")
        return {}
    readable = [file for file in visible_files(path, "*") if kind_of(file) in BUILDERS]
    train = _files_of(readable, TRAIN_NAMES)
    test = _files_of(readable, TEST_NAMES)
    if not train and shards:
        readable = [file for file in visible_files(path) if kind_of(file) in BUILDERS]
        words = {file: (*file.relative_to(path).parts[:-1], file.stem) for file in readable}
        train, test = splits_by_name(words)
    if train:
        return {"train": train} | ({"test": test} if test else {})
    found = sorted(str(file.relative_to(path)) for file in readable or path.iterdir())
    raise ValueError(
        f"{path} has no train file; it holds {found}, "
        f"needed is train{{{','.join(BUILDERS)}}} and, better, one of {', '.join(TEST_NAMES)}"
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of datasets wrote a folder; `load_from_disk` reads it."""
    names = ("state.json", "dataset_info.json")
    whole = all((folder / name).is_file() for name in names)
    return whole or (folder / "dataset_dict.json").is_file()


def visible_files(folder: Path, pattern: str = "**") -> list[Path]:
    """The files in a folder and below it, in order, without hidden ones: names of files or folders
    that begin with a dot, such as the copies that macOS and notebooks leave.

    Args:
        folder: may be hidden.
        pattern: "*" leaves out the files in folders below.
    """
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # it leaves hidden ones out
    return [file for file in sorted(folder / name for name in names) if file.is_file()]


def splits_by_name(words: Mapping[Path, Sequence[str]]) -> tuple[list[Path], list[Path]]:
    """The files to train and to test on, by the words in their names and in their folders' names.

    None to train on, if there are files for testing and no file has the name of a train split.
    """

    def named(names: tuple[str, ...]) -> list[Path]:
        return [file for file in words if any(has_name(word, names) for word in words[file])]

    held_out = set(named(TEST_NAMES))
    if held_out and not named(TRAIN_NAMES):
        return [], []
    train = [file for file in words if file not in held_out]
    return train, next(filter(None, (named((name,)) for name in TEST_NAMES)), [])


def _files_of(files: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The files with the first of these names that is there; capital letters do not count."""
    for name in names:
        found = [file for file in files if has_name(file.stem, (name,))]
        whole = [file for file in found if file.stem.lower() == name]
        if len(whole) > 1 or len({kind_of(file) for file in found}) > 1:
            raise ValueError(
                f"{found[0]} and {found[1].name} are files of the same split; remove or rename one."
            )
        if found:
            return found
    return []


def has_name(word: str, names: tuple[str, ...]) -> bool:
    """Whether a word is one of these names, or one with the number of a part behind it."""
    for name in names:
        if word.lower().startswith(name):
            rest = word.lower()[len(name) :]
            if not rest or _PART.fullmatch(rest):
                return True
    return False


def _pick(splits: Mapping[Any, Dataset], names: tuple[str, ...]) -> str | None:
    """The first of these names that is a split."""
    return next((name for name in names if name in splits), None)


def _find_label(data: Dataset) -> str:
    for name in _LABEL_NAMES:
        found = find_column(data, name)
        if found is not None:
            return found
    raise ValueError(
        f"No label column among {data.column_names}; name it with label_column, or choose another "
        "task: lm for running text, sft for conversations."
    )


def _find_texts(data: Dataset, label_column: str) -> list[str]:
    for names in TEXT_NAMES:
        found = [find_column(data, name) for name in names]
        if None not in found:
            return list(names)
    labels = find_column(data, label_column)
    textual = [name for name in columns_of_text(data) if name != labels]
    if len(textual) != 1:
        raise ValueError(
            f"Which of the columns {data.column_names} is the text? Name it with text_columns."
        )
    return textual


def _select(data: Dataset, text_columns: list[str], label_column: str, place: str) -> Dataset:
    """The columns text, text_pair and label of a split."""
    given = [*text_columns, label_column]
    found = [column for column in (find_column(data, name) for name in given) if column]
    missing = [name for name in given if find_column(data, name) is None]
    if missing:
        raise ValueError(
            f"There are no columns {missing} in {place}; the columns are {data.column_names}"
        )
    names = [*("text", "text_pair")[: len(text_columns)], "label"]
    if len(set(found)) < len(found):
        raise ValueError(f"text_columns and label_column are {given}; name each column once.")
    data = data.select_columns(found)
    data = data.rename_columns({old: new for old, new in zip(found, names) if old != new})
    for name, column in zip(names[:-1], found):
        _check_texts(data, name, f"{place}, column {column}")
    return data


def _check_texts(data: Dataset, name: str, place: str) -> None:
    """Refuse rows without text."""
    if not is_text(data, name):
        texts = enumerate(data[name], 1)
        row, value = next((pair for pair in texts if not isinstance(pair[1], str)), (1, None))
        raise ValueError(
            f"The column of {name} holds {data.features[name]}, not text: {place}, row {row}, is "
            f"{reprlib.repr(value)}; write it as text."
        )
    empty = [row for row, value in enumerate(data[name], 1) if not (value or "").strip()]
    if empty:
        raise ValueError(
            f"The column of {name} has rows without text: {place}, row {empty[0]} "
            f"({len(empty)} of {len(data)} rows). Fill or remove them."
        )
