"""Causal language models and tokenizers from a folder, a hub name, a GGUF file or an object."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qrefta.files.sources import is_gguf, loaded_from, pretrained_source, tokenizer_of
from qrefta.files.sources import load_tokenizer as tokenizer_in
from qrefta.model.causal import generates_text, is_causal
from qrefta.model.empty import model_class


def source_name(source: PreTrainedModel | str | Path) -> str:
    """The folder, file or hub name; for an object the name it was loaded from, or its class."""
    if isinstance(source, str | Path):
        return str(source)
    return loaded_from(source) or type(source).__name__


def load_causal_model(
    source: PreTrainedModel | str | Path,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> PreTrainedModel:
    """A causal language model: an object as it is, a name or file loaded.

    A model is loaded as the class that its config names. Another class, such as one with a head
    missing in the checkpoint, would have random weights.

    Args:
        source: an object; a folder or hub name, dense, prepared, merged or in bitsandbytes' 4 bits;
            or a `.gguf` file, whose weights transformers dequantizes to float32.
        device: for a name or file, such as "cuda:1"; default: the GPU, on a machine without one the
            CPU.
        trust_remote_code: whether to run code that comes with the model.
        dtype: of a name or file; "auto": as it is stored.

    Raises:
        ValueError: if the model does not predict the next token of a text, or needs code that is
            not trusted.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if not isinstance(source, str | Path):
        if not is_causal(source):
            raise _not_causal(type(source).__name__)
        return source
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": dtype, "device_map": place}
    if is_gguf(source):
        return AutoModelForCausalLM.from_pretrained(**pretrained_source(source), **options)
    named = pretrained_source(source, trust_remote_code)
    config = AutoConfig.from_pretrained(**named)
    kind = model_class(vars(config), source, trust_remote_code)
    name = f"{source} ({kind.__name__})"
    if not generates_text(kind, config):  # before the weights are read
        raise _not_causal(name)
    model = kind.from_pretrained(**named, use_safetensors=True, **options)
    if not is_causal(model):
        raise _not_causal(name)
    return model


def load_tokenizer(
    source: PreTrainedModel | str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer next to a model; None if there is none.

    Raises:
        ValueError: if there is no such source, or its tokenizer cannot be loaded.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    if isinstance(source, str | Path):
        return tokenizer_in(source, trust_remote_code)
    return tokenizer_of(source)


def _not_causal(name: str) -> ValueError:
    return ValueError(
        f"{name} is not a causal language model, which predicts the next token of a text. "
        "Encoder-decoder models, encoders, classifiers, models of images or sound, and classes "
        "without the method generate (GenerationMixin) are refused."
    )
