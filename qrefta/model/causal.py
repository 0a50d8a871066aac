"""Causal language models, told from others."""

from typing import Any

import torch
from transformers import PreTrainedModel

from qrefta.model.modes import eval_mode

_TOKENS = 6
_TOLERANCE = 1e-3  # of the largest logit; a token that is not seen changes nothing


def generates_text(model: Any, config: Any, must_generate: bool = True) -> bool:
    """Whether a model, or its class, takes a text and no other input, and writes on.

    Args:
        model: an object, or a class before its weights are read.
        config: of the model.
        must_generate: whether it needs the method generate.
    """
    takes_text = model.main_input_name == "input_ids" and not config.is_encoder_decoder
    return takes_text and (not must_generate or model.can_generate())


def is_causal(model: PreTrainedModel, must_generate: bool = True) -> bool:
    """Whether a model predicts the next token of a text, and does not see it.

    Args:
        model: with its weights.
        must_generate: whether it needs the method generate.
    """
    if not generates_text(model, model.config, must_generate):
        return False
    # BERT and its relatives have a head for the next token, and see that token unless `is_decoder`
    # is set. GPT-NeoX has the entry too, and never sees it. Other configs have no such entry.
    return getattr(model.config, "is_decoder", True) or _sees_no_later_token(model)


def _sees_no_later_token(model: PreTrainedModel) -> bool:
    """Whether another last token leaves the logits of the tokens before it as they are."""
    count = model.config.get_text_config().vocab_size
    tokens = torch.arange(1, _TOKENS + 1, device=model.device)[None] % count
    others = tokens.clone()
    others[0, -1] = (others[0, -1] + 1) % count
    with eval_mode(model), torch.no_grad():
        logits, changed = (model(input_ids=one).logits[:, :-1] for one in (tokens, others))
    return bool((logits - changed).abs().max() <= _TOLERANCE * logits.abs().max())
