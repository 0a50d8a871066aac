"""The values of `prepare(calibration=...)` -> batches of model inputs."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.choices import GENERIC_TEXT
from qrefta.config.checks import whole
from qrefta.files.sources import loaded_from, tokenizer_of
from qrefta.model.modes import eval_mode
from qrefta.model.positions import trained_positions
from qrefta.split.batches import Batch, accepted_inputs, batch_inputs, is_seq2seq, without_cache
from qrefta.split.texts import (
    MAX_LENGTH,
    ROWS,
    TOKENS,
    filled,
    generic_texts,
    read_texts,
    rows_of_text,
    windows_of_text,
)

Calibration = Iterable[Any] | str | Path


def calibration_batches(
    model: PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
    tokens: int | None = None,
) -> Iterable[Batch]:
    """Batches of model inputs to calibrate with.

    Text becomes windows of running text for causal language models (`windows_of_text`), and one
    row a text for other models (`rows_of_text`). A .txt file is one document for the first, and one
    text a line for the others.

    Args:
        model: the model to prepare.
        calibration: a file of text or a table; the word "text" for generic text; a list of strings;
            a `Dataset`, or the training split of a `DatasetDict`, with a column of text or with
            tokenized rows; or batches, which are returned as they are.
        tokenizer: of the model, for text; None: the tokenizer of the folder or hub name that the
            model was loaded from.
        seed: of the choice of texts.
        tokens: of text to read; None: `TOKENS`. Models that read one text a row get one text for
            every 64.

    Raises:
        ValueError: if there is no text, the model does not read text, or the tokenizer is missing
            or belongs to another model; if `tokens` is less than 1, or given with batches.
    """
    from datasets import DatasetDict  # takes a second to import

    if tokens is not None:
        whole("calibration_tokens", tokens, 1)
    if isinstance(calibration, DatasetDict):
        calibration = calibration.get("train") or next(iter(calibration.values()))
    runs = model.can_generate() and not is_seq2seq(model)
    is_batch = isinstance(calibration, Mapping)
    texts = None if is_batch else _texts(calibration, lines=not runs)
    if texts is None and tokens is not None:
        raise ValueError(
            f"calibration_tokens is {tokens} and calibration holds batches or tokenized rows, "
            "which are read whole; leave it out, or give text."
        )
    if texts is None:
        return [calibration] if is_batch else calibration  # type: ignore[return-value]
    _check_reads_text(model)
    tokenizer = tokenizer or _tokenizer_of(model)
    length = _max_length(model)
    tokens = tokens or TOKENS
    if runs:
        batches = windows_of_text(texts, tokenizer, tokens=tokens, max_length=length, seed=seed)
    else:
        # Decoders that classify refuse several rows without a pad token in their config.
        alone = getattr(model.config.get_text_config(), "pad_token_id", None) is None
        rows = max(1, tokens * ROWS // TOKENS)
        batches = rows_of_text(
            texts, tokenizer, rows=rows, max_length=length, seed=seed, alone=alone
        )
    _check_ids(model, batches)
    _check_runs(model, batches[0])
    return batches


def _texts(calibration: Calibration, lines: bool) -> list[str] | None:
    """The texts of a calibration; None if it has batches or tokenized rows.

    Args:
        calibration: as for `calibration_batches`.
        lines: whether a .txt file holds one text a line.
    """
    from datasets import Dataset

    from qrefta.files.tables import is_text, text_column

    if isinstance(calibration, str) and calibration == GENERIC_TEXT:
        return generic_texts()
    if isinstance(calibration, str | Path):
        return read_texts(calibration, lines=lines)
    if isinstance(calibration, Dataset):
        textual = any(is_text(calibration, name) for name in calibration.column_names)
        if "input_ids" in calibration.column_names or not textual:
            return None
        return filled(calibration[text_column(calibration, "The data set")], "The data set")
    if isinstance(calibration, list | tuple) and any(isinstance(one, str) for one in calibration):
        strange = [one for one in calibration if not isinstance(one, str)]
        if strange:
            raise ValueError(
                f"calibration holds strings and a {type(strange[0]).__name__}; give strings alone, "
                "or batches."
            )
        return filled(calibration, "The list")
    return None


def _check_reads_text(model: PreTrainedModel) -> None:
    """Raise ValueError if the model takes no token ids."""
    names = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" and "input_ids" not in names:
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}, not text; give calibration as "
            f"batches: dicts with a tensor {model.main_input_name}."
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            "Calibration on text needs a tokenizer, and none was found for "
            f"{loaded_from(model) or 'this model'!r}; give it: prepare(model, ..., "
            "tokenizer=tokenizer)."
        )
    return tokenizer


def _max_length(model: PreTrainedModel) -> int:
    """Tokens of a row that the model has positions for, at most `MAX_LENGTH`."""
    return min(MAX_LENGTH, trained_positions(model) or MAX_LENGTH)


def _check_ids(model: PreTrainedModel, batches: list[Any]) -> None:
    """Raise ValueError if a token has no embedding."""
    try:
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # CLIP and other models of text and images
        raise ValueError(
            f"{type(model).__name__} does not read text alone; give calibration as batches: dicts "
            "of all inputs of its forward pass."
        ) from None
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if embeddings is not None and largest >= embeddings:
        raise ValueError(
            f"The tokenizer gives the token {largest} and the model has {embeddings} embeddings; "
            "give the tokenizer of this model."
        )


def _check_runs(model: PreTrainedModel, batch: Batch) -> None:
    """Raise ValueError if the model does not run on the first row of text."""
    row = {name: values[:1] for name, values in batch_inputs(model, batch).items()}
    try:
        with eval_mode(model), without_cache(model), torch.no_grad():
            model(**accepted_inputs(model, row))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} fails on a row of text ({type(error).__name__}: {error}). If "
            "it does not read text alone, give calibration as batches: dicts of all inputs of its "
            "forward pass."
        ) from error
