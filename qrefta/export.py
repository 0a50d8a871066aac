"""A prepared model back to a plain transformers model."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qrefta.config import StackRow
from qrefta.experts import expert_path, restore_fused
from qrefta.factors import BANK
from qrefta.linear import AdaptedLinear
from qrefta.quantizer import prepared_config
from qrefta.stack import replace_module


@torch.no_grad()
def merge(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The same model with plain dense linears, W_l = dequant(Q_l) + Delta_l, in `dtype` throughout.

    Works in place and layer by layer: no second copy of the model is held. The weights are summed in float32 and
    rounded once, so the result differs from the prepared model by the rounding of parameters to `dtype` only. Experts
    are fused again, and computed as transformers does by default.

    Raises:
        ValueError: if the model is not prepared, or `dtype` is not a floating type.
    """
    config = prepared_config(model)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating type such as torch.bfloat16 or torch.float32")
    kept = _kept_in_float32(model, dtype)
    for row in config.stacks:
        for path in row.modules:
            if row.experts:
                _restore_experts(model, path, row.experts, _wanted(path, dtype, kept))
            else:
                layer = model.get_submodule(path)
                replace_module(model, path, _dense_linear(layer, row).train(layer.training))
    delattr(model, BANK)
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict) - {BANK}
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
            module.config.dtype = dtype
    _cast(model, dtype)
    return model.requires_grad_(True)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters as from_pretrained(dtype=...) would.

    Buffers keep their dtype (a rounded `inv_freq` turns positions far out by whole radians), and so do modules that
    the model wants in float32.
    """
    kept = _kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_wanted(name, dtype, kept))


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parts of names of the modules that the model wants in float32 when the rest is `dtype`."""
    kept = set(model._keep_in_fp32_modules_strict)
    return kept | set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else kept


def _wanted(name: str, dtype: torch.dtype, kept: set[str]) -> torch.dtype:
    return torch.float32 if kept.intersection(name.split(".")) and dtype.itemsize < 4 else dtype


def _restore_experts(model: PreTrainedModel, path: str, count: int, dtype: torch.dtype) -> None:
    """A fused parameter in the place of the linears of its experts, at its final dtype: it may be very large."""
    owner, _, name = path.rpartition(".")
    layers = (model.get_submodule(expert_path(path, expert)) for expert in range(count))
    restore_fused(model.get_submodule(owner), name, (layer.dense_weight() for layer in layers), dtype)


def _dense_linear(layer: AdaptedLinear, row: StackRow) -> nn.Module:
    """A `Linear` (or `Conv1D`, which stores its weight transposed) with the layer's merged float32 weight and bias."""
    weight = layer.dense_weight()
    out_features, in_features = weight.shape
    with torch.device("meta"):
        dense = (
            Conv1D(out_features, in_features)
            if row.transposed
            else nn.Linear(in_features, out_features, bias=layer.bias is not None)
        )
    dense.weight = nn.Parameter(weight.T.contiguous() if row.transposed else weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach())
    return dense
