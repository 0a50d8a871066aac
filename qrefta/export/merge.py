"""A prepared model back to a plain transformers model: in place, or written to a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qrefta._compat.transformers import (
    always_float32,
    set_always_float32,
    unmark_quantized,
)
from qrefta.config.report import StackReport
from qrefta.config.stack import BANK, expert_path
from qrefta.export.compare import Reference, reference, run_from_disk
from qrefta.export.result import ROUNDING_TOLERANCE, Export, check_agreement, check_floating
from qrefta.export.write import (
    check_complete,
    check_exportable,
    check_tokenizer,
    dense_tensors,
    tokenizer_notes,
    wanted_dtype,
    write_model,
)
from qrefta.files.folders import new_folder
from qrefta.model.prepared import prepared_config
from qrefta.model.replace import replace_module
from qrefta.model_card import write_card
from qrefta.nn.experts import restore_fused
from qrefta.nn.linear import adapted_layer, has_adapted_layer

_USE = "Load it as any transformers model; it needs no qrefta."


@overload
def merge(
    model: PreTrainedModel, dtype: torch.dtype = ..., *, out: None = None
) -> PreTrainedModel: ...
@overload
def merge(
    model: PreTrainedModel,
    dtype: torch.dtype = ...,
    *,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    inputs: Mapping[str, Any] | None = ...,
    tolerance: float = ...,
    max_shard_size: int | str = ...,
) -> Export: ...
def merge(
    model: PreTrainedModel,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float = ROUNDING_TOLERANCE,
    max_shard_size: int | str = "2GB",
) -> PreTrainedModel | Export:
    """The same model with plain dense linear layers, W_l = dequant(Q_l) + Delta_l, in `dtype`.

    Without `out` it works in place and layer by layer: no second copy of the model is held. If it
    is interrupted, the next call merges the layers that are left.

    With `out` the model stays as it is, and the dense model is written there a tensor at a time,
    tokenizer included. Besides the model this takes the memory of a shard and a linear layer in
    float32, or a fused parameter of experts in `dtype`. The folder is then run from disk, module by
    module, to compare its logits, and gets its name only if they agree. Models whose checkpoints
    hold a parameter in several tensors, as most mixtures of experts do, are loaded whole in `dtype`
    for this.

    The weights are summed in float32 and rounded once, so the result differs from the prepared
    model only by rounding parameters to `dtype`. Experts are fused again, and computed as the
    config names it.

    Args:
        model: prepared.
        dtype: of the dense parameters.
        out: folder to write; new or empty.
        tokenizer: written to `out`; default: the one that the model was loaded with. Give it if
            tokens were added.
        inputs: a batch to compare logits on; default: see `qrefta.export.examples`.
        tolerance: largest relative difference of the logits; beyond it nothing is written.
        max_shard_size: bytes of one file, or text such as "5GB".

    Raises:
        ValueError: if the model is not prepared, parameters are offloaded, `dtype` is not a
            floating type, `out` is not empty, the tokenizer has more tokens than the model, the
            generation settings are not valid, or the logits differ by more than `tolerance`.
    """
    config = prepared_config(model)
    check_floating(dtype)
    if out is None:
        check_complete(model)
        return _merge_in_place(model, config.stacks, dtype)
    check_exportable(model)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    with new_folder(out) as folder:
        expected = reference(model, inputs)
        write_model(
            model,
            folder,
            dtype,
            dense_tensors,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
        )
        difference = _check_folder(model, folder, dtype, expected, tolerance)
        name = str(dtype).removeprefix("torch.")
        write_card(folder, config, f"It was merged to dense {name} weights.", _USE)
    return Export(Path(out), difference, notes=tokenizer_notes(model, tokenizer))


def _check_folder(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    expected: Reference,
    tolerance: float,
) -> float:
    """The difference of the logits of a dense folder, which is read from disk as it runs."""
    difference = expected.difference(run_from_disk(model, folder, dtype))
    fix = "Give inputs that the model was made for, a wider dtype, or a larger tolerance."
    check_agreement(difference, tolerance, fix)
    return difference


def _merge_in_place(
    model: PreTrainedModel, stacks: list[StackReport], dtype: torch.dtype
) -> PreTrainedModel:
    """The model itself, with dense linear layers, no factor bank and no sign of quantization.

    An interrupted call can be repeated: layers that are dense already are left, and the marks of a
    prepared model go last.
    """
    for row in stacks:
        for path in row.stack.modules:
            if row.stack.experts:
                _restore_experts(model, path, row.stack.experts, dtype)
            elif has_adapted_layer(model, path):
                replace_module(model, path, _dense_linear(model, path, row, dtype))
    if hasattr(model, BANK):
        delattr(model, BANK)
    set_always_float32(model, always_float32(model) - {BANK})
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            unmark_quantized(module.config)
            module.config.dtype = dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wanted_dtype(model, name, dtype))
    model.requires_grad_(True)
    quantizer: Any = model.hf_quantizer  # an attribute that from_pretrained and `register` set
    quantizer.remove_quantization_config(model)
    return model


def _restore_experts(model: PreTrainedModel, path: str, count: int, dtype: torch.dtype) -> None:
    """Put back a fused parameter of experts, in its final dtype: it may be very large."""
    if not has_adapted_layer(model, expert_path(path, 0)):
        return
    dtype = wanted_dtype(model, path, dtype)
    owner, _, name = path.rpartition(".")
    layers = (adapted_layer(model, expert_path(path, expert)) for expert in range(count))
    weights = (layer.dense_weight() for layer in layers)
    restore_fused(model.get_submodule(owner), name, weights, dtype)


def _dense_linear(
    model: PreTrainedModel, path: str, row: StackReport, dtype: torch.dtype
) -> nn.Module:
    """A `Linear` with the merged weight and bias of an adapted layer, in their final dtypes.

    It is a `Conv1D`, which stores its weight transposed, if the model had one here.
    """
    layer = adapted_layer(model, path)
    has_bias = layer.bias is not None
    with torch.device("meta"):
        if row.stack.transposed:
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=has_bias)
    weight = dense_tensors(layer, row)["weight"].to(wanted_dtype(model, f"{path}.weight", dtype))
    dense.weight = nn.Parameter(weight.contiguous())
    if layer.bias is not None:
        bias = layer.bias.detach().to(wanted_dtype(model, f"{path}.bias", dtype))
        dense.bias = nn.Parameter(bias)
    return dense.train(layer.training)
