"""Batches that a model takes, made without its data: to compare two models on."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig as Config
from transformers import PreTrainedModel

from qrefta.files.sources import tokenizer_of

_ROWS = 2
_TOKENS = 16
_SENTENCES = (
    "The river runs quietly past the old mill, and in the evening nobody is on the bridge any "
    "more.",
    "Although the second half of the film is much too long, its music and its actors are very "
    "good.",
)
# For errors: how the command line takes a batch.
INPUTS_OPTION = (
    "`qrefta merge` and `qrefta export-lora` take --inputs FILE, a safetensors file of its tensors "
    "by name"
)
_IMAGE_SIZE = 64  # if the config does not say it
_SAMPLES = 16_000  # of a wave, one second
_CHOICES = 2  # of a question


def example_batches(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Batches of two that the model may take, always the same, the likeliest first.

    They are text if the model was loaded with a tokenizer: random tokens are far from the data of a
    model, and errors in its outputs are larger on them. Else they are random tokens, images or
    sound. Models of several kinds of input get them together, and alone.

    Raises:
        ValueError: for a model whose config does not say which inputs it takes.
    """
    batch = example_inputs(model)
    yield batch
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config
    if "input_ids" in takes and "input_ids" not in batch:
        yield batch | {"input_ids": _tokens(config.get_text_config(), generator)}
    if "pixel_values" in takes and "pixel_values" not in batch:
        batch = batch | {"pixel_values": _images(config, generator)}
        yield batch
    if "decoder_input_ids" in takes and "decoder_input_ids" not in batch:
        yield batch | {"decoder_input_ids": _tokens(config.get_text_config(), generator)}


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The likeliest of `example_batches`.

    Raises:
        ValueError: for a model whose config does not say which inputs it takes.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    text = config.get_text_config()
    # of a model that joins an encoder and a decoder, each with a config
    source = config.encoder if isinstance(getattr(config, "encoder", None), Config) else config
    main = model.main_input_name
    if main == "inputs":  # of sound, whatever form the encoder takes
        main = getattr(model.get_encoder(), "main_input_name", main)
    batch: dict[str, Tensor] = {}
    if main == "input_ids":
        found = _sentences(model)
        batch["input_ids"] = _tokens(text, generator) if found is None else found
        if type(model).__name__.endswith("MultipleChoice"):
            batch["input_ids"] = batch["input_ids"].unsqueeze(1).repeat(1, _CHOICES, 1)
    elif main == "input_features" and hasattr(source, "num_mel_bins"):
        frames = 2 * getattr(source, "max_source_positions", 1500)
        size = (_ROWS, source.num_mel_bins, frames)
        batch["input_features"] = torch.randn(size, generator=generator)
    elif main == "input_values":
        batch["input_values"] = torch.randn(_sound(source), generator=generator)
    if _takes_images(model):
        batch["pixel_values"] = _images(source, generator)
    if config.is_encoder_decoder and batch:
        batch["decoder_input_ids"] = _tokens(text, generator)
    if not batch:
        raise ValueError(
            f"The config of {type(model).__name__} does not say which inputs it takes "
            f"({model.main_input_name}); give a batch of it as `inputs`; {INPUTS_OPTION}."
        )
    return batch


def _sound(config: Any) -> tuple[int, ...]:
    """The shape of a batch: of spectrograms (rows, frames, bins), or of waves (rows, samples)."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _ROWS, config.max_length, config.num_mel_bins
    return _ROWS, _SAMPLES


def _takes_images(model: PreTrainedModel) -> bool:
    if model.main_input_name == "pixel_values":
        return True
    return hasattr(model.config, "vision_config") and hasattr(model, "vision_model")


def _images(config: Any, generator: torch.Generator) -> Tensor:
    """Random images, (rows, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", _IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(_ROWS, channels, height, width, generator=generator)


def _sentences(model: PreTrainedModel) -> Tensor | None:
    """Two sentences by the model's tokenizer; None if no tokenizer fits its vocabulary."""
    config: Any = model.config
    with suppress(ValueError, OSError, ImportError, KeyError):
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            return None
        rows = [tokenizer(text)["input_ids"][:_TOKENS] for text in _SENTENCES]
        width = min(map(len, rows))
        ids = torch.tensor([row[:width] for row in rows])
        fits = ids.max() < config.get_text_config().vocab_size
        if width > 1 and fits and not torch.equal(ids[0], ids[1]):
            return ids
    return None


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens, without the special tokens that some classifiers look for."""
    special = torch.tensor(list(_special_tokens(config)), dtype=torch.long)
    ids = torch.arange(config.vocab_size)
    ids = ids[~torch.isin(ids, special)]
    return ids[torch.randint(len(ids), (_ROWS, _TOKENS), generator=generator)]


def _special_tokens(config: Any) -> Iterator[int]:
    for name in ("pad", "eos", "bos"):
        tokens = getattr(config, f"{name}_token_id", None)
        if isinstance(tokens, list):
            yield from tokens
        elif tokens is not None:
            yield tokens
