"""Text to calibrate with -> batches of token ids.

Causal language models read running text, so their batches are windows of it: the texts in order,
with an end-of-text token after each, cut every `max_length` tokens. Other models read one text a
row.

Batches are large, since every batch costs one addition to each sum of second moments.
"""

import ast
import copy
import random
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from qrefta.files.encodings import check_text, text_encoding

# Of all windows together: SmolLM2-135M gathers them in about 40 s on two cores.
TOKENS = 16_384
ROWS = 256  # texts for a model that reads one text a row
MAX_LENGTH = 512  # tokens of a window or row
BATCH_TOKENS = 4096  # of a batch, padding included
_CHARACTERS = 64  # read of a long text for each token that is asked for
_RUNS = 64  # pieces that a long text is read in, spread evenly
_GENERIC_CHARACTERS = 1_000_000
_SHORTEST_DOCSTRING = 200  # characters


def read_texts(path: str | Path, *, lines: bool = True) -> list[str]:
    """The texts of a file that are not empty: the lines of a .txt file, or a column of a table.

    Args:
        path: txt, csv, tsv, json, jsonl or parquet. The column is text, sentence or content, else
            the first column of strings.
        lines: False: a .txt file is one text, with its newlines, as the task `lm` reads it.

    Raises:
        ValueError: if the file is missing, cannot be read or has no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f'There is no file {path} to calibrate with; the word "text" stands for generic text.'
        )
    texts: Iterable[str | None] = []
    if path.suffix.lower() == ".txt":
        content = _content(path, newline=None if lines else "")
        if not lines and content.strip():
            return [content]
        texts = content.split("\n")
    elif path.stat().st_size:  # datasets fails on a file of no bytes
        texts = _column_of_text(path)
    return filled(texts, str(path))


def _content(path: Path, newline: str | None) -> str:
    """The text of a file; `newline` as in `open`."""
    try:
        with path.open(encoding=text_encoding(path), newline=newline) as file:
            return file.read()
    except UnicodeDecodeError:
        check_text(path)
        raise


def _column_of_text(path: Path) -> Iterable[str | None]:
    """The column of text of a table."""
    # `datasets` takes a second to import
    from qrefta.files.tables import read_files, text_column

    try:
        data = read_files({"train": [path]})["train"]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table with rows: {error}") from error
    return data[text_column(data, path)]


def filled(texts: Iterable[str | None], source: str) -> list[str]:
    """The texts that are not empty, without white space around them.

    Raises:
        ValueError: if there is none; it names `source`.
    """
    stripped = [text.strip() for text in texts if text]
    found = [text for text in stripped if text]
    if not found:
        raise ValueError(
            f"{source} holds no text; calibration needs sentences of the kind that the model will "
            "read."
        )
    return found


def generic_texts() -> list[str]:
    """Docstrings of Python's standard library: English prose that every machine has.

    At most `_GENERIC_CHARACTERS` characters, always the same for one version of Python.

    Raises:
        ValueError: if this Python has no source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    room = _GENERIC_CHARACTERS
    for file in sorted(folder.glob("*.py")):
        for text in _docstrings(file):
            if len(text) <= room:
                texts.append(text)
                room -= len(text)
    return filled(texts, f"The standard library in {folder}")


@cache  # parsing the library takes a second
def _docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, without the shortest."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if len(text) >= _SHORTEST_DOCSTRING]


def windows_of_text(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = TOKENS,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches of windows of running text, (windows, max_length), without padding.

    Texts shorter than one window give one short window.

    Args:
        texts: in order. Of long texts, evenly spread pieces are read.
        tokenizer: of the model.
        tokens: of all windows together; less, if the texts are shorter.
        max_length: tokens of a window, or fewer if the tokenizer has a lower limit.
        seed: of the choice of windows.
    """
    _check_counts(tokens=tokens, max_length=max_length)
    length = min(max_length, tokenizer.model_max_length)
    ids = torch.tensor(token_stream(_spread(texts, _CHARACTERS * tokens), tokenizer))
    if not len(ids):
        raise ValueError("The tokenizer makes no token of the calibration text; give other text.")
    length = min(length, len(ids))
    whole = len(ids) // length
    count = min(whole, max(1, tokens // length))
    chosen = sorted(random.Random(seed).sample(range(whole), count))
    windows = ids[: whole * length].view(whole, length)[chosen]
    return [{"input_ids": part} for part in windows.split(max(1, BATCH_TOKENS // length))]


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of all texts in order, with one end-of-text token after each."""
    end: Any = tokenizer.eos_token_id
    ids: list[int] = []
    for text in tokenizer(texts, verbose=False)["input_ids"]:
        ids += text
        if end is not None and text[-1:] != [end]:  # some tokenizers add it
            ids.append(end)
    return ids


def _spread(texts: list[str], characters: int) -> list[str]:
    """About this many characters of the texts, in pieces that are spread evenly; all, if fewer."""
    if sum(map(len, texts)) <= characters:
        return texts
    joined = "\0".join(texts)
    length = max(1, characters // _RUNS)
    starts = [len(joined) * run // _RUNS for run in range(_RUNS)]
    pieces = [text for start in starts for text in joined[start : start + length].split("\0")]
    return [text for text in pieces if text]


def rows_of_text(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = ROWS,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    alone: bool = False,
) -> list[Any]:
    """Batches with one text a row, padded on the right; texts of similar length share a batch.

    Args:
        texts: to choose from.
        tokenizer: of the model; left as it is. Without a pad token it pads with its end-of-text
            token.
        rows: number of texts; all texts, if there are fewer.
        max_length: tokens kept of a text, or fewer if the tokenizer has a lower limit.
        seed: of the choice of texts.
        alone: every row is a batch, without padding.
    """
    _check_counts(rows=rows, max_length=max_length)
    chosen = random.Random(seed).sample(texts, min(rows, len(texts)))
    length = min(max_length, tokenizer.model_max_length)
    encode = partial(tokenizer, truncation=True, max_length=length)
    encoded = [dict(encode(text)) for text in chosen]
    return _single_rows(encoded) if alone else padded_batches(encoded, tokenizer)


def padded_batches(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Batches of tokenized rows of similar length, padded on the right.

    Without a pad token the end-of-text token pads; without both every row is a batch.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        return _single_rows(rows)
    return batches_by_length(rows, DataCollatorWithPadding(tokenizer))


def _single_rows(rows: list[dict[str, Any]]) -> list[Any]:
    """Every row as a batch."""
    return [{name: torch.tensor([value]) for name, value in row.items()} for row in rows]


def batches_by_length(rows: list[dict[str, Any]], collate: Callable[[list[Any]], Any]) -> list[Any]:
    """Batches of rows of similar length, with BATCH_TOKENS tokens, padding included, or one row.

    Args:
        rows: with `input_ids`, any number of tokens.
        collate: rows to a batch, padded to the longest.
    """
    batches: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        # The last row is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * len(row["input_ids"]) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [collate(batch) for batch in batches]


def _check_counts(**counts: int) -> None:
    wrong = {name: count for name, count in counts.items() if count < 1}
    if wrong:
        raise ValueError(f"{wrong}: each must be >= 1")
