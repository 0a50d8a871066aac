"""Private names of transformers, all in release 5.0 or earlier, unless another release is named."""

import copy
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

# Renamings and conversions of the tensors in a checkpoint. qrefta reads checkpoints without
# building the model's weights, and must find the same tensors. If they go: load the model and
# prepare it in memory. `Split` is in release 5.23.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

# Writes the files of a class that does not belong to transformers. If it goes: copy them.
from transformers.dynamic_module_utils import custom_object_save

# The table of forward passes of fused experts; qrefta adds one. If it goes: replace the
# experts' `forward`.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# Attention and its mask by torch's scaled_dot_product_attention; the documentation of custom
# attention functions imports them so. If they go: call that function.
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention
from transformers.masking_utils import sdpa_mask

# Gives `generate` to a custom class from before transformers 4.50, as AutoModel does.
# If it goes: such classes cannot chat.
from transformers.models.auto.auto_factory import (
    add_generation_mixin_to_remote_model as with_generate,
)

# Removes checkpoints above `save_total_limit`. Since 5.2. If it goes: sort the folders by step and
# remove the oldest.
from transformers.trainer_utils import rotate_checkpoints

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "EXPERTS_CONTRACT",
    "Chunk",
    "Concatenate",
    "MergeModulelist",
    "SampledTrainer",
    "Split",
    "WeightConverter",
    "WeightRenaming",
    "always_float32",
    "apply_gate",
    "attention_implementation",
    "checkpointing_options",
    "dequantized_gguf",
    "dot_natural_key",
    "enable_checkpointing",
    "get_model_conversion_mapping",
    "is_left_out",
    "keeps_float32",
    "mark_initialized",
    "model_of_config",
    "prepare_inputs",
    "registered_class",
    "rename_source_key",
    "revert_weight_conversion",
    "rotate_checkpoints",
    "saves_adapters_alone",
    "sdpa_attention",
    "sdpa_mask",
    "set_always_float32",
    "supports_attention_functions",
    "unmark_quantized",
    "was_initialized",
    "with_experts_implementation",
    "with_generate",
    "write_code",
]

# Attributes of a module that keeps fused experts and leaves its forward pass to
# `ALL_EXPERTS_FUNCTIONS`. Since 5.3.
EXPERTS_CONTRACT = ("config", "has_gate", "is_transposed", "_apply_gate")


def apply_gate(experts: Any, product: Tensor) -> Tensor:
    """The activation of fused experts with a gate, of the product of tokens and `gate_up_proj`.

    If it goes: compute gate and activation as the model's code does.
    """
    return experts._apply_gate(product)


def with_experts_implementation(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A copy of a config that chooses the forward pass of fused experts by its name in
    `ALL_EXPERTS_FUNCTIONS`.

    The copy shares its parts with the config; the public name would be written into them, too. If
    it goes: replace the experts' `forward`.
    """
    named = copy.copy(config)
    named._experts_implementation_internal = name
    return named


def was_initialized(parameter: nn.Parameter) -> bool:
    """Whether `from_pretrained` filled the parameter from a file.

    It marks each parameter that it fills, and leaves no other trace. If it goes: compare the names
    in the files with those in the model.
    """
    return getattr(parameter, "_is_hf_initialized", False)


def is_left_out(model: PreTrainedModel, path: str) -> bool:
    """Whether files may be without a tensor of the model, because the model makes it as it loads.

    Its class names the tensors that it never saves (Marian's tables of positions), and patterns of
    tensors that published checkpoints do not have. If it goes: nothing may be missing in a file.
    """
    patterns = model._keys_to_ignore_on_load_missing or ()
    never_saved = model._keys_to_ignore_on_save or ()
    return path in never_saved or any(re.search(pattern, path) for pattern in patterns)


def mark_initialized(module: Any) -> None:
    """Keep `from_pretrained` from drawing the module's parameters at random.

    It does so with unmarked modules after it has filled the model. If it goes: override the model's
    `_init_weights`.
    """
    module._is_hf_initialized = True


def always_float32(model: PreTrainedModel) -> set[str]:
    """Patterns of names of tensors that `from_pretrained` keeps in float32 for any narrower dtype.

    If it goes: `modules_to_not_convert` of the quantizer, and a cast back after
    loading.
    """
    return set(model._keep_in_fp32_modules_strict or ())


def set_always_float32(model: PreTrainedModel, names: set[str]) -> None:
    """Replace `always_float32(model)`, of this model and not of its class."""
    model._keep_in_fp32_modules_strict = names


def keeps_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained(dtype=...)` keeps a tensor in float32, because its class wants that.

    As transformers does, it searches the whole name for the patterns of the class: a pattern may
    have dots ("gate.weight"), and * stands for any characters. If it goes: convert these tensors to
    the dtype that was asked for.
    """
    if dtype.itemsize >= 4:
        return False
    patterns: list[Any] = list(always_float32(model))
    if dtype == torch.float16:
        patterns += model._keep_in_fp32_modules or ()
    alternation, *_ = build_glob_alternation(patterns)
    return bool(patterns) and alternation.search(name) is not None


def attention_implementation(model: nn.Module) -> str:
    """For example sdpa; "" if the model names none.

    If it goes: treat every model as one without flash attention.
    """
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or ""


def supports_attention_functions(model: PreTrainedModel) -> bool:
    """Whether the model calls the function that `AttentionInterface` has under its name.

    If it goes: no model does.
    """
    return model._supports_attention_backend


class SampledTrainer(Trainer):
    """A Trainer that takes the order of its training rows from a method, if that gives one.

    If `_get_train_sampler` goes: override `get_train_dataloader`.
    """

    def sampler_of(self, rows: Any) -> Sampler[int] | None:
        """The order of some training rows; None: the Trainer's."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        found = self.sampler_of(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset) if found is None else found


def unmark_quantized(config: PreTrainedConfig) -> None:
    """Remove the mark, if any, that `from_pretrained` sets in the config of a quantized model.

    A dense model is not quantized, so its config must not say so. If it goes: nothing to do.
    """
    config.__dict__.pop("_is_quantized", None)


def dequantized_gguf(model: nn.Module) -> str | None:
    """Name of the GGUF file whose weights `from_pretrained` dequantized into this model; else None.

    transformers 5.24 marks such a model as quantized although it is dense. Where its kernels keep
    the weights packed, they are bytes. If it goes: the marks are gone too, and there is nothing to
    do.
    """
    settings: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(settings, "quant_method", None) != "gguf":
        return None
    dense = all(parameter.is_floating_point() for parameter in model.parameters())
    return settings.gguf_file if dense else None


def model_of_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of the class with the config and dtype.

    `from_config` is public for the Auto classes only. If it goes: `model_class(config)` under
    `torch.set_default_dtype`.
    """
    return model_class._from_config(config, dtype=dtype)


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether `save_pretrained` writes the PEFT adapters that `add_adapter` added.

    If it goes: a model with such adapters is not saved.
    """
    return getattr(model, "_hf_peft_config_loaded", False)


def registered_class(name: str) -> type[PreTrainedModel] | None:
    """The model class of this name that the user gave to `AutoModelFor...register`.

    transformers registers classes that come with a model, too; they serve that model alone. If it
    goes: only transformers' classes are found by their names.
    """
    for auto_name in dir(transformers.models.auto.modeling_auto):
        auto = getattr(transformers.models.auto.modeling_auto, auto_name)
        registered = getattr(getattr(auto, "_model_mapping", None), "_extra_content", {})
        for kind in registered.values():
            its_own = str(getattr(kind, "__module__", "")).startswith("transformers_modules.")
            if getattr(kind, "__name__", None) == name and not its_own:
                return kind
    return None


def write_code(model: PreTrainedModel, folder: Path, config: PreTrainedConfig) -> None:
    """Write the code of a model whose class is not transformers', as `save_pretrained` does.

    The config gets the names of its classes. If it goes: copy the files of the model's folder.
    """
    if model._auto_class is not None:
        custom_object_save(model, folder, config=config)  # pyright: ignore[reportArgumentType]


def prepare_inputs(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch on the trainer's device, as its training step computes with it.

    If it goes: move the batch's tensors to `trainer.args.device`.
    """
    return trainer._prepare_inputs(inputs)


def enable_checkpointing(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Switch on gradient checkpointing.

    transformers 5.24 renamed it to activation checkpointing and warns about the old name.

    Args:
        model: the model whose blocks recompute their activations in the backward pass.
        options: keywords of `torch.utils.checkpoint.checkpoint`; default: transformers'.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # before transformers 5.24
        enable = model.gradient_checkpointing_enable
    enable(options)


def checkpointing_options(model: nn.Module) -> list[dict[str, Any]]:
    """Keywords of `torch.utils.checkpoint.checkpoint` of the blocks with gradient checkpointing.

    transformers keeps the function, with its keywords, in each block. If it goes: nothing to check
    before a model is prepared; switching it on later is checked.
    """
    blocks: list[Any] = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    # code in a model's folder may set the mark and call torch's function itself
    functions = [getattr(block, "_gradient_checkpointing_func", None) for block in blocks]
    return [function.keywords for function in functions if function is not None]


_MASK_OF_FRAMES = "_get_feature_vector_attention_mask"
# A mask of samples, (batch, samples), and a length -> the mask of as many frames.
FrameMask = Callable[[Tensor, int], Tensor | None]


def frame_masks(model: nn.Module) -> FrameMask | None:
    """How a model that hears turns a mask of samples into a mask of the frames of its blocks.

    The function gives None for a length that is not the number of frames. None for other models.
    If the methods go, samples that are padding count.
    """
    found: Any = next(
        (module for module in model.modules() if hasattr(module, _MASK_OF_FRAMES)), None
    )
    if found is None:
        return None
    of_mask = getattr(found, _MASK_OF_FRAMES)
    of_length = found._get_feat_extract_output_lengths
    # the frames before the adapter, in classes that have one
    adapter = "add_adapter" in signature(of_mask).parameters
    options = {"add_adapter": False} if adapter else {}

    def frames(mask: Tensor, length: int) -> Tensor | None:
        whole = of_length(torch.tensor(mask.shape[1]), **options)
        return of_mask(length, mask, **options) if int(whole) == length else None

    return frames
