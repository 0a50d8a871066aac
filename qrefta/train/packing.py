"""Several conversations in one sequence, where attention keeps them apart.

TRL puts the rows of a batch into one sequence without padding, whose positions begin at 0 with each
row. Flash attention reads the rows' bounds. The masks of transformers' other attention functions
follow the positions: the result is the same, but every row is compared with all others before the
mask removes them. On a CPU `row_attention` computes it row by row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from qrefta._compat.transformers import (
    attention_implementation,
    sdpa_attention,
    sdpa_mask,
    supports_attention_functions,
)
from qrefta.model.adapters import without_peft
from qrefta.model.modes import eval_mode

ROW_ATTENTION = "qrefta_rows"
MOST_TOKENS = 1 << 14  # of a joined batch by default; its mask has their square of bytes
_TOKENS = 4  # of a row of the check


def joins_rows(model: Any, tokens: float) -> bool:
    """Whether sft joins the rows of a batch by default: rows stay apart, and it is faster.

    Without flash attention a GPU computes the rows' products with each other, which takes longer
    than padding. On a CPU the mask of the joined rows must not become large.

    Args:
        model: a language model, prepared, plain or PEFT's.
        tokens: of the largest batch; infinite if rows are not cut.
    """
    base = without_peft(model)
    if "flash" in attention_implementation(base):
        return not _has_state(base)
    if torch.accelerator.is_available() or tokens > MOST_TOKENS or not _takes_row_attention(base):
        return False
    try:
        return keeps_rows_apart(base)
    except (RuntimeError, TypeError, ValueError):  # its code refuses joined rows
        return False


def join_by_default(model: nn.Module, args: Any) -> None:
    """Let a run of sft join the rows of a batch if `joins_rows` says so, unless `args` decide.

    Args:
        model: to be trained.
        args: TRL's SFTConfig; a `padding_free` of None is replaced, unless `packing` is set.
    """
    if args.packing or args.padding_free is not None:
        return
    length = inf if args.max_length is None else args.max_length
    args.padding_free = joins_rows(model, args.per_device_eval_batch_size * length)


def check_apart(model: nn.Module) -> None:
    """Raise ValueError if a row of a joined batch sees the row before it."""
    if not keeps_rows_apart(model):
        raise ValueError(
            f"The attention of {type(model).__name__} ({attention_implementation(model)}) does "
            "not keep packed conversations apart; leave packing and padding_free out, or load the "
            'model with attn_implementation="flash_attention_2" or "sdpa".'
        )


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether no row of a joined batch sees the row before it.

    The model reads two batches of two rows that differ in their first row only. The output of the
    second row must be the same.
    """
    flash = "flash" in attention_implementation(model)  # it reads the bounds
    if flash and not _has_state(without_peft(model)):
        return True
    first, other, second = (
        list(range(start, start + _TOKENS)) for start in (0, _TOKENS, 2 * _TOKENS)
    )
    device = next(model.parameters()).device
    outputs = []
    half = torch.autocast(device.type, torch.bfloat16, enabled=flash)  # it takes no float32
    with eval_mode(model), torch.no_grad(), half:
        for row in (first, other):
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in joined([row, second]).items()
            }
            outputs.append(model(**inputs).logits[0, _TOKENS:].float())
    one, two = outputs
    return bool((one - two).abs().max() <= 1e-2 * one.abs().max())


def joined(rows: list[list[int]]) -> dict[str, Any]:
    """Token ids of rows as one sequence, as TRL's collator joins them without padding."""
    lengths = torch.tensor([len(row) for row in rows])
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,  # with a cache transformers takes the rows for one
        "seq_idx": torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)[None],
    }


@contextmanager
def row_by_row(model: Any) -> Iterator[None]:
    """The model's attention is `row_attention` on a CPU, if it takes another function."""
    base = without_peft(model)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if not (on_cpu and _takes_row_attention(base)):
        yield
        return
    own = attention_implementation(base)
    base.set_attn_implementation(ROW_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(own)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The sdpa attention of transformers, row by row where one sequence holds several.

    Args:
        module: the attention layer.
        query, key, value: (1, heads, tokens, size of a head).
        attention_mask: (1, 1, tokens, tokens), which keeps the rows apart, or None.
        cu_seq_lens_q: bounds of the rows, (rows + 1); None: of an ordinary batch.
        options: of transformers' function.

    Returns:
        (1, tokens, heads, size of a head), and no attention weights.
    """
    if cu_seq_lens_q is None or attention_mask is None or len(query) > 1:
        return sdpa_attention(module, query, key, value, attention_mask, **options)
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        row = slice(start, end)
        mask: Tensor | None = attention_mask[..., row, row]
        if torch.equal(mask, _causal(end - start)):
            mask = None  # the kernel leaves the upper half out
        its_query, its_key, its_value = (tensor[:, :, row] for tensor in (query, key, value))
        outputs.append(sdpa_attention(module, its_query, its_key, its_value, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _causal(length: int) -> Tensor:
    return _triangle(1 << length.bit_length())[..., :length, :length]


@lru_cache(maxsize=16)
def _triangle(size: int) -> Tensor:
    return torch.ones(1, 1, size, size, dtype=torch.bool).tril()


def _has_state(model: Any) -> bool:
    """Whether layers other than attention carry tokens from row to row."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    states = ("attention" not in kind or "linear" in kind for kind in kinds)  # linear_attention too
    return getattr(model, "_is_stateful", False) or any(states)


def _takes_row_attention(model: Any) -> bool:
    if not isinstance(model, PreTrainedModel):
        return False
    return attention_implementation(model) == "sdpa" and supports_attention_functions(model)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
