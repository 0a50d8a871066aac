"""A prepared model written as a plain transformers folder, a tensor at a time."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta._compat.hub import commit_hash
from qrefta._compat.transformers import (
    keeps_float32,
    revert_weight_conversion,
    unmark_quantized,
    write_code,
)
from qrefta.config.report import StackReport
from qrefta.config.stack import BANK, expert_path
from qrefta.files.code import is_trusted
from qrefta.files.companions import copy_companions
from qrefta.files.layout import SINGLE
from qrefta.files.shards import ShardWriter, write_index
from qrefta.files.sources import (
    is_gguf,
    loaded_from,
    pretrained_source,
    resolve_folder,
    save_tokenizer,
)
from qrefta.files.whole_file import replace_text
from qrefta.model.adapters import check_no_peft
from qrefta.model.check import check_in_memory
from qrefta.model.names import stored_together
from qrefta.model.prepared import is_prepared, prepared_config
from qrefta.nn.linear import AdaptedLinear, adapted_layer, has_adapted_layer

# The tensors of an adapted linear layer, without its bias, by their names in the module.
LayerTensors = Callable[[AdaptedLinear, StackReport], Mapping[str, Tensor]]


def check_complete(model: PreTrainedModel) -> None:
    """Refuse a model with PEFT adapters, or with parameters that have no values.

    Raises:
        ValueError: naming the fix.
    """
    check_no_peft(model)
    check_in_memory(model, "Load it whole, without offloading.")


def check_exportable(model: PreTrainedModel) -> None:
    """Refuse a dense or prepared model that cannot be written.

    Raises:
        ValueError: as `check_complete`, or if an earlier merge in place was interrupted.
    """
    check_complete(model)
    stacks = prepared_config(model).stacks if is_prepared(model) else []
    for row in stacks:
        for path in row.stack.adapted:
            if not has_adapted_layer(model, path):
                raise ValueError(
                    f"{path} is dense already: an earlier merge in place was interrupted. Call "
                    "qrefta.merge(model) again, which finishes it, or load the model again."
                )


def write_model(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    stored: LayerTensors,
    quantization: QuantizationConfigMixin | None = None,
    max_shard_size: int | str = "2GB",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a prepared model as a plain transformers folder, with its tokenizer.

    Args:
        model: prepared.
        folder: empty.
        dtype: of floating-point tensors, except those that `stored` gives in another form and those
            that the model wants in float32.
        stored: gives the tensors of an adapted linear layer.
        quantization: the config that makes transformers load these tensors.
        max_shard_size: bytes of one file, or text such as "5GB".
        tokenizer: see `copy_tokenizer`.

    Raises:
        ValueError: before a tensor is written, if the generation settings are not valid, or
            bitsandbytes cannot hold the model's layers.
    """
    together = stored_together(model)
    if together and quantization is not None:
        raise ValueError(
            f"Checkpoints of {type(model).__name__} hold several linear layers as one "
            f"({', '.join(next(iter(together.values())))}), which bitsandbytes' format cannot; "
            'give base="residual".'
        )
    copy_tokenizer(model, folder, tokenizer)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # transformers refuses invalid settings
    config = plain_config(model, dtype, quantization)
    write_code(model, folder, config)
    replace_text(folder / "config.json", config.to_json_string(use_diff=True))
    writer = ShardWriter(folder, "model-", convert_file_size_to_int(max_shard_size))
    waiting: dict[str, Tensor] = {}
    for name, tensor in plain_tensors(model, dtype, stored, quantization is not None):
        waiting[name] = tensor.detach()
        del tensor  # free it before the next one is made
        members = together.get(name, [name])
        if waiting.keys() >= set(members):
            _add(writer, model, {member: waiting.pop(member) for member in members})
    files = writer.close()
    if len(files) == 1:
        (folder / files[0]).rename(folder / SINGLE)
    else:
        write_index(folder, files)


def dense_tensors(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    """The merged weight in the layout of the layer that was replaced."""
    weight = layer.dense_weight()
    return {"weight": weight.T if row.stack.transposed else weight}


def plain_config(
    model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationConfigMixin | None
) -> PretrainedConfig:
    """The model's config without the entries that preparing added."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    unmark_quantized(config)
    if quantization is not None:
        config.quantization_config = quantization
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    return config


def copy_tokenizer(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Copy the tokenizer and the other small files of the folder that the model was loaded from.

    Args:
        model: dense or prepared.
        folder: to write to.
        tokenizer: written in place of the one that the model was loaded with.
    """
    source = model.name_or_path or ""
    if is_gguf(source):
        if tokenizer is None:
            save_tokenizer(source, folder)
    elif source:
        with suppress(ValueError):  # made in this process: neither a folder nor on the hub
            revision = commit_hash(model.config)
            copy_companions(resolve_folder(source, weights=False, revision=revision), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for.

    The other way is allowed: many models have more embeddings than tokens, for even sizes.

    Raises:
        ValueError: naming the largest token number and the size of the model's vocabulary.
    """
    largest = max(tokenizer.get_vocab().values())
    size = vocabulary_size(model.config)
    if size is not None and largest >= size:
        raise ValueError(
            f"The tokenizer has the token number {largest} and the model's vocabulary {size} "
            "tokens; give the model's tokenizer as `tokenizer`."
        )


def tokenizer_notes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A note if the model was resized after its folder was loaded, and no tokenizer was given.

    The tokenizer in the folder does not know tokens that were added since.
    """
    source = loaded_from(model)
    if tokenizer is not None or not source:
        return []
    with suppress(ValueError, OSError, ImportError):
        named = pretrained_source(source, is_trusted(model))
        before = vocabulary_size(type(model.config).from_pretrained(**named))
        now = vocabulary_size(model.config)
        if before != now:
            return [
                f"the model's vocabulary has {now} tokens, and {before} in {source}, where the "
                "tokenizer was taken from: if tokens were added, give the tokenizer that has them "
                "as tokenizer="
            ]
    return []


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """Rows of a model's embeddings of tokens; None without such embeddings."""
    return getattr(config.get_text_config(), "vocab_size", None)


def wanted_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that from_pretrained(dtype=...) gives a parameter: float32 if the model wants that.

    Buffers keep their dtype: a rounded `inv_freq` turns far positions by whole radians.
    """
    return torch.float32 if keeps_float32(model, name, dtype) else dtype


def plain_tensors(
    model: PreTrainedModel, dtype: torch.dtype, stored: LayerTensors, quantized: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain model by its full name, in its final dtype; tied tensors once.

    Args:
        model: prepared or dense.
        dtype, stored: see `write_model`.
        quantized: whether `stored` gives tensors in another form than weights.
    """
    stacks = prepared_config(model).stacks if is_prepared(model) else []
    rows = {path: row for row in stacks for path in row.stack.adapted}
    first_experts = {
        expert_path(path, 0): path
        for row in stacks
        if row.stack.experts
        for path in row.stack.modules
    }
    for path, name, tensor in _tensors(model):
        row = rows.get(path)
        if row is None or (name == "bias" and not row.stack.experts):
            full_name = f"{path}.{name}" if path else name
            yield full_name, _converted(model, full_name, tensor, dtype)
        elif row.stack.experts:
            # One parameter holds all experts: it is written in place of the first.
            if path in first_experts and name == "weight":
                fused_path = first_experts[path]
                yield fused_path, _fused(model, fused_path, row, dtype, stored)
        elif name == "weight":
            for key, value in stored(adapted_layer(model, path), row).items():
                full_name = f"{path}.{key}"
                # Scales are float32, whatever the dtype of the model.
                if not (quantized and key != "weight") and value.is_floating_point():
                    value = value.to(wanted_dtype(model, full_name, dtype))
                yield full_name, value


def _converted(model: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in its final dtype; buffers and integers as they are."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    return tensor.to(wanted_dtype(model, name, dtype))


def _fused(
    model: PreTrainedModel, path: str, row: StackReport, dtype: torch.dtype, stored: LayerTensors
) -> Tensor:
    """The parameter of all experts of a block, in its final dtype."""
    wanted = wanted_dtype(model, path, dtype)
    weights = []
    for expert in range(row.stack.experts):
        layer = adapted_layer(model, expert_path(path, expert))
        weights.append(stored(layer, row)["weight"].to(wanted))
    return torch.stack(weights)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """Module path, name and tensor of all tensors in a checkpoint except the factors.

    Tied tensors come once.
    """
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or key.split(".")[0] == BANK:
            continue
        seen.add(id(tensor))
        path, _, name = key.rpartition(".")
        yield path, name, tensor if isinstance(tensor, nn.Parameter) else tensor.detach()


def _add(writer: ShardWriter, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Write tensors with the names and in the form of the architecture's published checkpoints."""
    for key, value in revert_weight_conversion(model, tensors).items():
        writer.add(key, value)
