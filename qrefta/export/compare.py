"""Two models on the same inputs: how far apart their outputs are."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from qrefta._compat.transformers import model_of_config
from qrefta.files.safetensors import Checkpoint
from qrefta.files.sources import tokenizer_of
from qrefta.model.modes import eval_mode
from qrefta.model.names import sources

_ROWS = 2
_TOKENS = 16
_SENTENCES = (
    "The river runs quietly past the old mill, and in the evening nobody is on the bridge any "
    "more.",
    "Although the second half of the film is much too long, its music and its actors are very "
    "good.",
)
_IMAGE_SIZE = 64  # if the config does not say it


def output_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| over all entries; infinite if an entry is not finite."""
    expected = expected.float()
    difference = (found.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    return difference.item() if torch.isfinite(difference) else float("inf")


def run_from_disk(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class of `model`, whose parameters are read from files as they are used.

    They are mapped, and not kept; modules may read each other's, or change them in place.
    `from_pretrained` loads a checkpoint in which several tensors make up one parameter; then all of
    them are held.
    """
    config = type(model.config).from_pretrained(folder)
    config.dtype = dtype
    with init_empty_weights():
        written = model_of_config(type(model), config, dtype)
    checkpoint = Checkpoint(folder)
    stored_names = {
        name: parts[0][0]
        for name, parts in sources(written, checkpoint).items()
        if len(parts) == len(parts[0]) == 1
    }
    written.tie_weights()
    # A checkpoint holds one of two tied parameters; both read it.
    for tied, source in written.all_tied_weights_keys.items():
        for name, other in ((tied, source), (source, tied)):
            if other in stored_names:
                stored_names.setdefault(name, stored_names[other])
    if not {name for name, _ in written.named_parameters()} <= stored_names.keys():
        return type(model).from_pretrained(folder, dtype=dtype)
    tensors = checkpoint.mapped(set(stored_names.values()))
    state = {name: tensors[stored] for name, stored in stored_names.items()}
    written.load_state_dict(state, strict=False, assign=True)
    return written


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first output that is no loss (logits, if there are any) in eval mode, on the CPU; each
    module keeps its mode.

    Floating-point inputs are cast to the model's dtype. They may hold labels, of which some models
    make the inputs of a decoder.

    Raises:
        ValueError: if the model gives nothing but a loss.
    """
    batch = {name: _placed(value, model) for name, value in inputs.items()}
    with eval_mode(model):
        given = model(**batch)
    named = given if isinstance(given, Mapping) else dict(enumerate(given))
    for name, output in named.items():
        if "loss" not in str(name) and isinstance(output, Tensor) and output.dim() > 0:
            return output.cpu()
    raise ValueError(
        f"{type(model).__name__} gives only a loss for inputs with {', '.join(inputs)}; two models "
        "are compared by their logits. Leave out the labels."
    )


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two that the model takes, always the same.

    It is text if the model was loaded with a tokenizer: random tokens are far from the data of a
    model, and errors in its outputs are larger on them. Else it is random tokens, images or sound
    features.

    Raises:
        ValueError: for a model whose config does not say which inputs it takes.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    text = config.get_text_config()
    batch: dict[str, Tensor] = {}
    if model.main_input_name == "input_ids":
        batch |= _sentences(model) or {"input_ids": _tokens(text, generator)}
    elif model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        size = (_ROWS, config.num_mel_bins, frames)
        batch["input_features"] = torch.randn(size, generator=generator)
    if _takes_images(model):
        batch["pixel_values"] = _images(config, generator)
    if config.is_encoder_decoder and batch:
        batch["decoder_input_ids"] = _tokens(text, generator)
    if not batch:
        raise ValueError(
            f"The config of {type(model).__name__} does not say which inputs it takes "
            f"({model.main_input_name}); give a batch of it as `inputs`."
        )
    return batch


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


def _sentences(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sentences by the model's tokenizer; nothing if no tokenizer fits its vocabulary."""
    config: Any = model.config
    with suppress(ValueError, OSError, ImportError, KeyError):
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            return {}
        rows = [tokenizer(text)["input_ids"][:_TOKENS] for text in _SENTENCES]
        width = min(map(len, rows))
        ids = torch.tensor([row[:width] for row in rows])
        fits = ids.max() < config.get_text_config().vocab_size
        if width > 1 and fits and not torch.equal(ids[0], ids[1]):
            return {"input_ids": ids}
    return {}


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


def _placed(value: Any, model: Any) -> Any:
    """A tensor on the model's device, in the model's dtype if it is floating-point."""
    if not isinstance(value, Tensor):
        return value
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(devices, torch.device("cpu"))
    dtype = model.dtype if value.is_floating_point() else value.dtype
    return value.to(device, dtype)
