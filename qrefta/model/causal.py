"""Causal language models, told from others."""

from typing import Any

import torch
from transformers import PreTrainedModel

from qrefta.model.modes import eval_mode

_TOKENS = 6
# Logits that differ by no more are equal, as shares of the largest logit: in float32, and in
# relative steps of a narrower dtype. A token that is not seen may still change the order of sums,
# where it changes how many tokens an expert gets.
_TOLERANCE = 1e-4
_STEPS = 4


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
    # No entry of a config tells: BERT and its relatives see the next token unless `is_decoder` is
    # set, GPT-NeoX never sees it, and XLNet and XLM, which see it, have no such entry.
    try:
        return _sees_no_later_token(model)
    except (IndexError, RuntimeError, TypeError, ValueError):  # so few tokens are too few for it
        return bool(getattr(model.config, "is_decoder", True))


def _sees_no_later_token(model: PreTrainedModel) -> bool:
    """Whether another last token leaves the logits of the tokens before it as they are."""
    count = model.config.get_text_config().vocab_size
    # from the middle of the vocabulary: XLM takes its padding token, one of the first, for padding
    tokens = (count // 2 + torch.arange(_TOKENS, device=model.device)[None]) % count
    others = tokens.clone()
    others[0, -1] = (others[0, -1] + 1) % count
    with eval_mode(model), torch.no_grad():
        logits, changed = (model(input_ids=one).logits[:, :-1] for one in (tokens, others))
    tolerance = max(_TOLERANCE, _STEPS * torch.finfo(logits.dtype).eps)
    sees = (logits - changed).abs() > tolerance * logits.abs().max()
    return not sees.any()  # values that are no number tell nothing
