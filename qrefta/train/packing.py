"""Several conversations in one sequence: only where attention keeps them apart.

TRL puts the rows of a batch into one sequence, whose positions begin at 0 with each row. Flash
attention reads the rows' bounds; the masks of transformers' other attention functions follow the
positions. A model with attention code that does neither would let a row see the rows before it.
"""

from typing import Any

import torch
from transformers import Trainer

from qrefta._compat.transformers import attention_implementation

_TOKENS = 4  # of a row


def check_apart(trainer: Trainer) -> None:
    """Raise ValueError if a row of a packed batch sees the row before it.

    The model reads two batches of two rows that differ in their first row only. The output of the
    second row must be the same.
    """
    model: Any = trainer.model
    if "flash" in attention_implementation(model):
        return  # it reads the bounds, and may not run in the model's dtype without autocast
    first, other, second = (
        list(range(start, start + _TOKENS)) for start in (0, _TOKENS, 2 * _TOKENS)
    )
    outputs = []
    was_training = model.training
    model.eval()
    try:
        for row in (first, other):
            rows = [{"input_ids": ids, "labels": ids} for ids in (row, second)]
            batch = trainer.data_collator(rows)
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            with torch.no_grad():
                outputs.append(model(**inputs, use_cache=False).logits[0, _TOKENS:].float())
    finally:
        model.train(was_training)
    one, two = outputs
    if (one - two).abs().max() > 1e-2 * one.abs().max():
        raise ValueError(
            f"The attention of {type(model).__name__} ({attention_implementation(model)}) does "
            "not keep packed conversations apart; leave packing and padding_free out, or load the "
            'model with attn_implementation="flash_attention_2" or "sdpa".'
        )
