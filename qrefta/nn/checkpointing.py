"""Selective gradient checkpointing: the results of attention are kept, the rest is recomputed.

With T tokens in a sequence and hidden states of width d, attention takes 2 T multiplications and
additions for each number of its result, a linear layer 2 x its input width. So attention is the
part to keep once T is above the width of the model, and its result is one more hidden state a
block, next to the block's input, and one float32 a head and token.

Products with frozen weights are computed again, without the last one of a block, whose output the
backward pass does not read (`qrefta.nn.product`). So are dequantized weights, once in the
recomputation and once in the backward pass of a block. To keep them in between would hold a whole
block in the dtype of the computation, and save one pass over its weights, next to six operations a
weight and token in its products.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from qrefta._compat.torch import operator_schema
from qrefta.choices import SELECTIVE

# Parts of the names of attention operators: torch's fused kernels, flex_attention, flash-attn and
# xformers. The namespaces of the last two hold hashes. Attention made of plain matmuls has none.
_NAMES = ("attention", "attn")


def check_checkpointing(value: object) -> None:
    """Refuse a value that the setting `gradient_checkpointing` does not have.

    Raises:
        ValueError: if it is not True, False or "selective".
    """
    if not isinstance(value, bool) and value != SELECTIVE:
        raise ValueError(
            f"gradient_checkpointing is {value!r}; it must be True, False or {SELECTIVE!r}"
        )


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a block's forward pass and of its recomputation, for the argument
    `context_fn` of `torch.utils.checkpoint.checkpoint`.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(
    context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if _is_attention(operator) and not _drops(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_attention(operator: Any) -> bool:
    """Whether an operator computes attention and gives its result as new tensors."""
    schema = operator_schema(operator)
    writes = schema is not None and schema.is_mutable
    return not writes and any(name in str(operator) for name in _NAMES)


def _drops(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an attention operator draws random numbers for dropout.

    If it were kept, the recomputation would not draw them, and dropout behind it would get other
    numbers than in the forward pass: wrong gradients.
    """
    schema = operator_schema(operator)
    if schema is None:  # flex_attention, which has no dropout
        return False
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return any("dropout" in name and value for name, value in given.items())
