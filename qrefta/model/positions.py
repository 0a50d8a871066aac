"""The number of tokens that a model can read, and the number that it was trained to read.

Learned positions, and fixed ones that a model keeps in a table, end with the table: a longer row is
an error of shapes or of an index deep in the model. Rotary and relative positions are computed, so
a longer row runs, but the model was not trained on it.
"""

import re

from torch import Tensor, nn
from transformers import PreTrainedModel

# the last part of a table's name: BERT, Canine, OpenAI GPT, OPT and GPT-J, GPT-2, CTRL
_TABLE = re.compile(
    r"(^|\.)((char_)?position_embeddings?|positions_embed|embed_positions|wpe|pos_encoding)$"
)
_OTHERS = re.compile("vision|visual|image|audio|entity")


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that a model can read; None if its positions are computed.

    A table may hold rows for no position: RoBERTa's begins behind the padding token, OPT's at 2.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":
        return config.max_seq_len  # of its table of ALiBi's biases
    sizes = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if _is_table(name) and isinstance(weight, Tensor):
            sizes.append(len(weight) - _first_row(module))
    for name, table in model.named_buffers():
        if _is_table(name) and table.ndim == 2:
            sizes.append(len(table))
    named = getattr(config, "max_position_embeddings", None)
    if sizes and named:
        sizes.append(named)  # Nystromformer's table has two rows more than positions
    return min(sizes, default=None)


def trained_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that a model was trained on, by its config; None if it is not told,
    or the positions are distances without a limit (ALiBi, T5, XLNet).
    """
    limit = position_limit(model)
    if limit is not None:
        return limit
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    return positions if positions > 0 and not getattr(config, "alibi", False) else None


def _is_table(name: str) -> bool:
    """Whether a module or buffer holds the positions of text, by its name."""
    return _TABLE.search(name) is not None and _OTHERS.search(name) is None


def _first_row(table: nn.Module) -> int:
    """The row of a table that is the first position's."""
    padding = getattr(table, "padding_idx", None)
    return getattr(table, "offset", 0) if padding is None else padding + 1
