"""Text files as windows of tokens."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qrefta.files.encodings import check_text, text_encoding


class Text(NamedTuple):
    """A file's text.

    Attributes:
        file: its name and the name of its folder, such as "wikitext2/test.txt".
        content: all of it.
    """

    file: str
    content: str


def read_text(file: str | Path) -> Text:
    """The text of a file, as it is, without a byte-order mark.

    Raises:
        ValueError: if the file is missing, or is not text in UTF-8, UTF-16 or UTF-32.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"There is no text file {file}.")
    check_text(path)
    content = path.read_bytes().decode(text_encoding(path))
    return Text(Path(*path.parts[-2:]).as_posix(), content)


def cut_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[Tensor]:
    """Windows of a text, in order and without overlap, each (tokens,) of at most `length` tokens.

    If the tokenizer puts a BOS token before a text, each window begins with one. The first token of
    a window has no context and is not scored: it is the BOS token, or else a token of the text. A
    last piece that leaves nothing to score is dropped.

    Args:
        text: of a file.
        tokenizer: of the model.
        length: tokens of a window, with the BOS token; at least 2.
        limit: windows at most; default: the whole text.

    Raises:
        ValueError: for a length below 2, a limit below 1, or a text of fewer than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"window is {length}; it must be at least 2 tokens")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 window, or None for all")
    encoded = tokenizer(text.content, add_special_tokens=False, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if len(tokens) < 2:
        raise ValueError(f"{text.file} has {len(tokens)} tokens; at least 2 are needed.")
    start = torch.tensor(_start(tokenizer), dtype=torch.long)
    pieces = tokens.split(length - len(start))[:limit]
    windows = [torch.cat([start, piece]) for piece in pieces]
    return [window for window in windows if len(window) > 1]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, if the tokenizer puts one before a text."""
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        return []
    first: Any = tokenizer("a")["input_ids"]
    return [bos] if first[:1] == [bos] else []
