"""The length of a row in tokens, by the positions of the model and the limit of the tokenizer."""

import reprlib
import warnings
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.model.positions import position_limit, trained_positions

MAX_LENGTH = 128  # tokens, where none are given
_SPACE = "▁"  # in SentencePiece; an empty vocabulary of T5 holds it


def row_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int:
    """Tokens at which rows are cut: `max_length`, or else 128 or the model's positions.

    A warning tells of a length beyond the rows that the model was trained on, or beyond the
    tokenizer's `model_max_length`.

    Raises:
        ValueError: if `max_length` is not a positive number, or is above the positions of the
            model; or if the tokenizer has no words.
    """
    _check_words(tokenizer)
    if max_length is None:
        return min(MAX_LENGTH, trained_positions(model) or MAX_LENGTH)
    if type(max_length) is not int or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; it must be a number of tokens, 1 or more")
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length is {max_length}, and {type(model).__name__} has {limit} positions; give "
            f"max_length={limit} (--max-length {limit}) or less. Longer rows are cut there."
        )
    _warn(f"max_length is {max_length}", max_length, model, tokenizer)
    return max_length


def check_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], rows: str
) -> None:
    """Raise ValueError if a row that is not cut has more tokens than the model has positions.

    A warning tells of rows that are longer than the model was trained on.

    Args:
        model: to be trained.
        tokenizer: of the model.
        lengths: of the rows, tokens.
        rows: words for the rows, such as "prompt with its answer".
    """
    longest = max(lengths)
    limit = position_limit(model)
    if limit is not None and longest > limit:
        count = sum(length > limit for length in lengths)
        raise ValueError(
            f"{count} of {len(lengths)} rows ({rows}) have more than the {limit} positions of "
            f"{type(model).__name__}; row {lengths.index(longest) + 1} has {longest} tokens. Give "
            "a lower max_length (--max-length), or remove these rows."
        )
    _warn(f"The longest row ({rows}) has {longest} tokens", longest, model, tokenizer)


def check_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Sequence[int]],
    split: str,
) -> None:
    """Raise ValueError if a row has a token that the model has no embedding for, or the tokenizer
    has no words.

    Args:
        model: to be trained.
        tokenizer: that made the rows.
        rows: token ids.
        split: their name.
    """
    _check_words(tokenizer)
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if embeddings is None or max(tokenizer.get_vocab().values()) < embeddings:
        return
    for row, ids in enumerate(rows, 1):
        if max(ids, default=0) >= embeddings:
            raise ValueError(
                f"The {split} split, row {row}, has the token {max(ids)} "
                f"({tokenizer.decode([max(ids)])!r}), and {type(model).__name__} has {embeddings} "
                "embeddings. Give the tokenizer of this model; or, after adding tokens to it, call "
                "model.resize_token_embeddings(len(tokenizer)) before prepare."
            )


def warn_of_cut(count: int, rows: int, split: str, max_length: int) -> None:
    """Warn that `count` of the rows of a split are cut to `max_length` tokens, if there are any."""
    if count:
        warnings.warn(
            f"{count} of {rows} rows of the {split} split have more than {max_length} tokens and "
            "are cut there; a higher max_length (--max-length) keeps more of them.",
            stacklevel=4,
        )


def check_answers_remain(count: int, rows: int, split: str, max_length: int | None) -> None:
    """Warn that `count` rows of a split have no answer before the cut and are left out.

    Raises:
        ValueError: if no row is left.
    """
    if count == rows:
        raise ValueError(
            f"No row of the {split} split has an answer in its first {max_length} tokens; give "
            "a higher max_length."
        )
    if count:
        warnings.warn(
            f"{count} of {rows} rows of the {split} split have "
            f"no answer in their first {max_length} tokens and are left out.",
            stacklevel=3,
        )


def _check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that transformers made for a folder without tokenizer files."""
    special = tokenizer.all_special_tokens
    if not {*tokenizer.get_vocab()} - {*special, _SPACE}:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path!r}) has no "
            f"words: its vocabulary holds special tokens only, {reprlib.repr(special)}, as "
            "transformers makes it for a folder without tokenizer files. Save the tokenizer of "
            "this model into the folder: tokenizer.save_pretrained(...)"
        )


def _warn(
    subject: str, length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = trained_positions(model)
    if trained is not None and length > trained:
        warnings.warn(
            f"{subject}, and {type(model).__name__} was trained on rows of at most {trained} "
            f"(max_position_embeddings in its config); it reads the rest worse.",
            stacklevel=4,
        )
    elif length > tokenizer.model_max_length:
        warnings.warn(
            f"{subject}, and the tokenizer is made for {tokenizer.model_max_length} "
            "(model_max_length); the model may read the rest worse.",
            stacklevel=4,
        )
