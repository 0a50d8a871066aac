"""Running text: documents, cut into windows of tokens.

A document is a .txt file, with its newlines, or a row of a table. All documents of a split are read
in order, with one end-of-text token after each, and cut every `max_length` tokens. Text and windows
lie on the disk (in the cache of `datasets`), so files may be larger than the memory.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from qrefta.files.encodings import check_text, text_encoding
from qrefta.files.tables import from_generator, kind_of, text_column, versions
from qrefta.train.data import TEST_SHARE, Loaded, read_splits, split_files, with_test
from qrefta.train.head_loss import WithoutLogits
from qrefta.train.mean_loss import LossByTokens
from qrefta.train.tasks.recipe import Recipe, combined

_CHARACTERS = 1_000_000  # of a piece of a file, and of the pieces that are tokenized together
_PIECES = Features({"text": Value("string"), "ends": Value("bool")})
_WINDOWS = Features({"input_ids": List(Value("int32"))})


def load_text(source: str | Path, seed: int, column: str | None = None) -> Loaded:
    """Documents in order, as the split train and, unless there is a single document, test.

    The columns are text and ends: a row is a document, or a piece of one, and says whether the
    document ends with it.

    Args:
        source: a .txt file, which is one document; a folder of documents, in which subfolders are
            read too; a table with a column of text, or a folder of tables, whose rows are the
            documents; a folder with one file a split (`train.txt`, `valid.txt`); or a hub name.
        seed: of the choice of the documents to test on.
        column: of the text in a table; None: the column with a usual name, else the first of text.

    Raises:
        ValueError: if there is no text, a row without text, or no such column.
    """
    files = split_files(source, shards=True)
    if any(kind_of(file) == ".txt" for part in files.values() for file in part):
        if column is not None:
            raise ValueError(f"{source} holds .txt files, which have no column {column!r}.")
        return Loaded.of(_text_files(files, seed), "lm")
    return documents(read_splits(source, shards=True), str(source), seed, column)


def documents(parts: DatasetDict, source: str, seed: int, column: str | None = None) -> Loaded:
    """The splits of `load_text`, from splits with other columns.

    Args:
        parts: the split train and maybe test.
        source: name of the data, for errors.
        seed: of the choice of the documents to test on.
        column: of the text; None: as for `load_text`.

    Raises:
        ValueError: as `load_text`.
    """
    are_read = parts["train"].features == _PIECES  # their rows may be pieces of one document
    for name, part in parts.items():
        if part.features != _PIECES:
            place = f"{source} ({name})"
            parts[name] = _documents(part, text_column(part, place, column), place)
    if len(parts["train"]) == 1 or are_read:
        return Loaded.of(parts, "lm")
    return with_test(parts, "lm", seed)


def text_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Next-token prediction on windows of `max_length` tokens.

    The rest that fills no window is left out. Without a test split the last windows are the test.

    Args:
        model: not used; recipes of other tasks check it.
        tokenizer: of the model.
        data: from `load_text`.
        max_length: tokens of a window.

    Raises:
        ValueError: if a split has less text than one window, or a single document less than two.
    """
    windows = DatasetDict()
    for name, part in data.items():
        windows[name] = from_generator(
            _windows, _WINDOWS, rows=part, tokenizer=tokenizer, length=max_length
        )
    needed = 1 if "test" in windows else 2
    for name, part in windows.items():
        if len(part) < needed:
            raise ValueError(
                f"The {name} split has less than {needed * max_length} tokens; give more text or a "
                "lower max_length."
            )
    if "test" not in windows:
        whole = windows["train"]
        held_out = max(1, round(TEST_SHARE * len(whole)))
        windows["train"] = whole.select(range(len(whole) - held_out))
        windows["test"] = whole.select(range(len(whole) - held_out, len(whole)))
    trainer = combined(LossByTokens, WithoutLogits, Trainer)
    return Recipe(windows["train"], windows["test"], trainer, collate=_batch)


def _text_files(files: dict[str, list[Path]], seed: int) -> DatasetDict:
    """The documents of .txt files by split; without a test split, some of several are it."""
    documents = files["train"]
    if "test" not in files and len(documents) > 1:
        count = max(1, round(TEST_SHARE * len(documents)))
        chosen = set(random.Random(seed).sample(documents, count))
        files = {
            "train": [file for file in documents if file not in chosen],
            "test": [file for file in documents if file in chosen],
        }
    parts = DatasetDict()
    for name, part in files.items():
        other = next((file for file in part if kind_of(file) != ".txt"), None)
        if other is not None:
            raise ValueError(f"{other} is among .txt files; put tables in another folder.")
        parts[name] = from_generator(_pieces, _PIECES, files=versions(part))
    return parts


def _pieces(files: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """The content of each file in pieces, which end where a line or at least a word ends."""
    for name, *_ in files:
        held = ""
        try:
            with Path(name).open(encoding=text_encoding(name), newline="") as file:
                while part := file.read(_CHARACTERS):
                    held += part
                    end = held.rfind("\n") + 1 or held.rfind(" ")
                    if end > 0:
                        yield {"text": held[:end], "ends": False}
                        held = held[end:]
        except UnicodeDecodeError:
            check_text(name)
            raise
        yield {"text": held, "ends": True}


def _documents(part: Dataset, column: str, source: str) -> Dataset:
    """The rows of a table as documents."""
    return part.map(
        _document,
        with_indices=True,
        fn_kwargs={"column": column, "source": source},
        remove_columns=part.column_names,
        features=_PIECES,
        desc="Reading",
    )


def _document(row: dict[str, Any], index: int, column: str, source: str) -> dict[str, Any]:
    if not isinstance(row[column], str) or not row[column].strip():
        raise ValueError(
            f"{source}, row {index + 1}, column {column}: there is no text but {row[column]!r}; "
            "fill the row, or remove it."
        )
    return {"text": row[column], "ends": True}


def _windows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[dict[str, list[int]]]:
    """Windows of `length` tokens across the documents; the rest at the end is left out."""
    open_ids: list[int] = []
    for ids in _tokens(rows, tokenizer):
        open_ids += ids
        whole = len(open_ids) // length * length
        for start in range(0, whole, length):
            yield {"input_ids": open_ids[start : start + length]}
        open_ids = open_ids[whole:]


def _tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each row, with the end-of-text token if its document ends."""
    end: list[Any] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # such as Llama's <s>, which opens every document
    opening: list[Any] = tokenizer("")["input_ids"]  # type: ignore[assignment]
    begin = [token for token in opening if token not in end]
    opens = True
    for batch in _batches(rows):
        texts = [row["text"] for row in batch]
        encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in zip(batch, encoded):
            yield [*(begin if opens else []), *ids, *(end if row["ends"] else [])]
            opens = row["ends"]


def _batches(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Rows in order, with `_CHARACTERS` characters together, or one row."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in map(dict, rows):
        if batch and size + len(row["text"]) > _CHARACTERS:
            yield batch
            batch = []
            size = 0
        batch.append(row)
        size += len(row["text"])
    if batch:
        yield batch


def _batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of windows, (rows, tokens); every token is learned."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
