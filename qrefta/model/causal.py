"""Causal language models, told from others by their class and config."""

from typing import Any


def is_causal(model: Any, config: Any, must_generate: bool = True) -> bool:
    """Whether a model predicts the next token of a text.

    Args:
        model: an object, or a class before its weights are read.
        config: of the model.
        must_generate: whether it needs the method generate.
    """
    takes_text = model.main_input_name == "input_ids" and not config.is_encoder_decoder
    # BERT and its relatives have a head for the next token, which sees the next token unless
    # `is_decoder` is set. Configs of causal models have no such entry.
    is_decoder = takes_text and getattr(config, "is_decoder", True)
    return is_decoder and (not must_generate or model.can_generate())
