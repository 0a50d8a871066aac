"""A prepared model written as a plain transformers folder, a tensor at a time."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta._compat.hub import commit_hash
from qrefta._compat.transformers import (
    always_float32,
    float32_under_float16,
    revert_weight_conversion,
    unmark_quantized,
    write_code,
)
from qrefta.config import StackReport
from qrefta.files.safetensors import (
    SINGLE,
    ShardWriter,
    copy_companions,
    replace_text,
    resolve_folder,
    write_index,
)
from qrefta.files.sources import is_gguf, save_tokenizer
from qrefta.hf_quantizer import is_prepared, prepared_config
from qrefta.model.names import stored_together
from qrefta.nn.experts import expert_path
from qrefta.nn.factors import BANK
from qrefta.nn.linear import AdaptedLinear, adapted_layer

# The tensors of an adapted linear layer, without its bias, by their names in the module.
Stored = Callable[[AdaptedLinear, StackReport], Mapping[str, Tensor]]


def write_model(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    stored: Stored,
    quantization: QuantizationConfigMixin | None = None,
    max_shard_size: int | str = "2GB",
) -> None:
    """Write a prepared model as a plain transformers folder, with the tokenizer it came with.

    Args:
        model: prepared.
        folder: empty.
        dtype: of floating-point tensors, except those that `stored` gives in another form and those
            that the model wants in float32.
        stored: gives the tensors of an adapted linear layer.
        quantization: the config that makes transformers load these tensors.
        max_shard_size: bytes of one file, or text such as "5GB".
    """
    together = stored_together(model)
    if together and quantization is not None:
        raise ValueError(
            f"Checkpoints of {type(model).__name__} hold several linear layers as one "
            f"({', '.join(next(iter(together.values())))}), which bitsandbytes' format cannot; "
            'give base="residual".'
        )
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
    copy_tokenizer(model, folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = plain_config(model, dtype, quantization)
    write_code(model, folder, config)
    replace_text(folder / "config.json", config.to_json_string(use_diff=True))


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


def copy_tokenizer(model: PreTrainedModel, folder: Path) -> None:
    """Copy the tokenizer and the other small files of the folder that the model was loaded from."""
    source = model.name_or_path
    if not source:
        return
    if is_gguf(source):
        save_tokenizer(source, folder)
        return
    with suppress(ValueError):  # made in this process: neither a folder nor on the hub
        revision = commit_hash(model.config)
        copy_companions(resolve_folder(source, weights=False, revision=revision), folder)


def wanted_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that from_pretrained(dtype=...) gives a parameter: float32 if the model wants that.

    Buffers keep their dtype: a rounded `inv_freq` turns far positions by whole radians.
    """
    kept = always_float32(model)
    if dtype == torch.float16:
        kept |= float32_under_float16(model)
    narrow = dtype.itemsize < 4
    return torch.float32 if narrow and kept.intersection(name.split(".")) else dtype


def plain_tensors(
    model: PreTrainedModel, dtype: torch.dtype, stored: Stored, quantized: bool = False
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
    model: PreTrainedModel, path: str, row: StackReport, dtype: torch.dtype, stored: Stored
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
