"""Batches to calibrate with: the inputs of a model, and the tokens of them that count."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from qrefta._compat.transformers import FrameMask

Batch = Mapping[str, Any] | BatchEncoding | Tensor


def no_batches() -> ValueError:
    """The error for a calibration without batches."""
    return ValueError("There are no batches to calibrate with; give at least one.")


def not_finite(path: str) -> ValueError:
    """The error for an input of a linear layer."""
    return ValueError(
        f"The input of {path} holds NaN or infinity; try the model in float32 or bfloat16."
    )


def row_count(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return max(len(value) for value in tensors if value.dim())


def copied(batch: Batch) -> Batch:
    """A batch that stays as it is when the caller fills its tensors again."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if not isinstance(batch, Mapping):
        return batch
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()
    }


def batch_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, on the model's device, with inputs for a decoder.

    A row of a tokenized data set, of lists, tensors or arrays, is a batch of one row.

    Raises:
        ValueError: if the batch holds no tensors, arrays or lists of rows of one length.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if isinstance(batch, Tensor):
        batch = {main: batch}
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is a {type(batch).__name__}; give a dict of tensors or a tensor."
        )
    device = next(model.parameters()).device
    inputs: dict[str, Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            inputs[name] = torch.from_numpy(value).to(device)
        elif isinstance(value, Tensor):
            inputs[name] = value.to(device)
        elif isinstance(value, list) and value:
            with suppress(ValueError, TypeError, RuntimeError):  # strings, or rows that differ
                inputs[name] = torch.tensor(value, device=device)
    if not inputs or (batch.get(main) is not None and main not in inputs):
        given = ", ".join(f"{name} ({type(value).__name__})" for name, value in batch.items())
        raise ValueError(
            f"A batch holds no tensors for the model: it has {given}. Make tensors with "
            'tokenizer(texts, padding=True, return_tensors="pt"), or .with_format("torch") of a '
            "tokenized data set; text itself goes in as a list of strings, a file or a Dataset."
        )
    if all(value.dim() <= 1 for value in ([inputs[main]] if main in inputs else inputs.values())):
        inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
    if (
        is_seq2seq(model)
        and "input_ids" in inputs
        and not any("decoder_input" in name for name in inputs)
    ):
        if "labels" in inputs:
            inputs.setdefault("decoder_attention_mask", (inputs["labels"] != -100).long())
        else:
            inputs["decoder_input_ids"] = inputs["input_ids"]
            if "attention_mask" in inputs:
                inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def accepted_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs that the model's forward pass takes; labels only if decoder inputs are made of
    them.
    """
    names = inspect.signature(model.forward).parameters
    # Some models define forward(**kwargs).
    wrapped = getattr(model, "main_input_name", "input_ids") not in names and "kwargs" in names
    wants_labels = is_seq2seq(model) and "decoder_input_ids" not in inputs
    accepted: dict[str, Any] = {
        name: value
        for name, value in inputs.items()
        if (wrapped or name in names) and (name != "labels" or wants_labels)
    }
    if not accepted:
        raise ValueError(
            f"A batch holds no tensors for the model: it has {list(inputs)}; it must have some of "
            f"{list(names)[:3]} ..."
        )
    if "logits_to_keep" in names:
        # Logits over the whole vocabulary would take most memory. A tensor keeps one token of them
        # only; at a whole number Gemma 4 leaves tokens out of its last layers too.
        accepted["logits_to_keep"] = torch.zeros(1, dtype=torch.long)
    return accepted


def is_seq2seq(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def kept_tokens(x: Tensor, mask: Tensor | None, frames: FrameMask | None = None) -> Tensor:
    """The tokens that a mask keeps, (tokens, in), of x (batch, length, in) or (batch * length, in).

    In x the batch may also be the second axis, as in XLNet, and a mask may have an axis of choices,
    as for multiple choice. All rows, if the mask has another shape.

    Args:
        x: input of a linear layer.
        mask: of the batch, (batch, length), or (batch, choices, length).
        frames: see `qrefta._compat.transformers.frame_masks`.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if mask.dim() == 3:
        mask = mask.flatten(0, 1)
    if mask.dim() != 2:
        return rows
    if x.dim() == 3 and x.shape[:-1] != mask.shape:
        found = frames(mask, x.shape[1]) if frames and len(x) == len(mask) else None
        mask = mask.T if found is None else found
    fits = x.shape[:-1] == mask.shape or (x.dim() == 2 and len(rows) == mask.numel())
    kept = mask.reshape(-1).bool().to(x.device)
    return rows[kept] if fits and not kept.all() else rows


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turn the cache of keys and values off in every config of a model.

    With a cache transformers does not tell the sequences of a packed row apart.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    configs += [getattr(config, "text_config", None) for config in configs]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
