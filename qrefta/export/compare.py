"""Two models on the same inputs: how far the outputs of what was written are from those of what was trained."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from qrefta._compat.transformers import model_of_config
from qrefta.files.safetensors import Checkpoint, resolve_folder
from qrefta.model.names import sources

_ROWS, _TOKENS = 2, 16
_SENTENCES = (
    "The river runs quietly past the old mill, and in the evening nobody is on the bridge any more.",
    "Although the second half of the film is much too long, its music and its actors are very good.",
)
_IMAGE_SIZE = 64  # where a config leaves it open


def output_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, over all entries; infinite where one of them is not finite."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm().clamp(
        min=1e-30
    )
    return difference.item() if torch.isfinite(difference) else float("inf")


def run_from_disk(
    model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """A dense model whose modules read their parameters from a folder's files as they run, and keep none.

    `from_pretrained` with a device map of disk holds all of them once as it loads (transformers 5.23); it is what
    loads a checkpoint of which it makes one parameter of several tensors.
    """
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype
    with init_empty_weights():
        model = model_of_config(model_class, config, dtype)
    checkpoint = Checkpoint(folder)
    found = {
        name: parts[0][0]
        for name, parts in sources(model, checkpoint).items()
        if len(parts) == len(parts[0]) == 1
    }
    model.tie_weights()
    buffers = {name for name, _ in model.named_buffers()}
    if any(
        name not in found
        for name, _ in model.named_parameters()
        if name not in model.all_tied_weights_keys
    ):
        return model_class.from_pretrained(folder, dtype=dtype)
    for name in buffers & found.keys():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, checkpoint.read(found[name]))
    index = {
        name: {"safetensors_file": str(checkpoint.file(tensor)), "weight_name": tensor}
        for name, tensor in found.items()
        if name not in buffers
    }
    for tied, source in model.all_tied_weights_keys.items():
        index |= {
            one: index[other] for one, other in ((tied, source), (source, tied)) if other in index
        }
    return dispatch_model(
        model, {"": "disk"}, main_device="cpu", offload_index=index, force_hooks=True
    )


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first output (logits, where there are any) in eval mode, on the CPU; the model's mode is kept.

    Floating inputs are cast to the model's dtype.
    """
    training = model.training
    try:
        batch = {name: _placed(value, model) for name, value in inputs.items()}
        return model.eval()(**batch)[0].cpu()
    finally:
        model.train(training)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two that the model takes, always the same.

    Text, where the model came from a place with a tokenizer: random tokens are far from what a model is made for, and
    what is left out of it counts for more. Else random tokens, images or sound features.

    Raises:
        ValueError: for a model whose inputs its config does not tell.
    """
    generator = torch.Generator().manual_seed(0)
    config, text = model.config, model.config.get_text_config()
    vision = getattr(config, "vision_config", config)
    batch = {}
    if model.main_input_name == "input_ids":
        batch |= _sentences(model) or {"input_ids": _tokens(text, generator)}
    elif model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        batch["input_features"] = torch.randn(
            _ROWS, config.num_mel_bins, frames, generator=generator
        )
    if model.main_input_name == "pixel_values" or (
        vision is not config and hasattr(model, "vision_model")
    ):
        size = getattr(vision, "image_size", _IMAGE_SIZE)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        batch["pixel_values"] = torch.randn(_ROWS, channels, height, width, generator=generator)
    if config.is_encoder_decoder and batch:
        batch["decoder_input_ids"] = _tokens(text, generator)
    if not batch:
        raise ValueError(
            f"What {type(model).__name__} takes ({model.main_input_name}) cannot be told from its config; "
            "give a batch of it as `inputs`."
        )
    return batch


def _sentences(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sentences by the model's tokenizer; nothing where it has none that fits its vocabulary."""
    with suppress(ValueError, OSError, ImportError, KeyError):
        folder = resolve_folder(model.name_or_path, weights=False) if model.name_or_path else Path()
        if any(folder.glob("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            rows = [tokenizer(text)["input_ids"][:_TOKENS] for text in _SENTENCES]
            width = min(map(len, rows))
            ids = torch.tensor([row[:width] for row in rows])
            if (
                width > 1
                and ids.max() < model.config.get_text_config().vocab_size
                and not torch.equal(*ids)
            ):
                return {"input_ids": ids}
    return {}


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens without the special ones that some classifiers look for."""
    ids = torch.arange(config.vocab_size)
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")]
    for one in special:
        for token in one if isinstance(one, list) else [one]:
            ids = ids[ids != (-1 if token is None else token)]
    return ids[torch.randint(len(ids), (_ROWS, _TOKENS), generator=generator)]


def _placed(value: Any, model: torch.nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return value
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return value.to(device, model.dtype if value.is_floating_point() else value.dtype)
