"""The base that a LoRA goes on: the model that was prepared, or a plain model of the residuals."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Conv1D, PreTrainedModel, PreTrainedTokenizerBase

from qrefta._compat.transformers import keeps_float32
from qrefta.choices import LoraBase
from qrefta.config.report import StackReport
from qrefta.export.write import plain_config, wanted_dtype, write_model
from qrefta.files.code import is_trusted
from qrefta.files.sources import pretrained_source
from qrefta.hf_config import QReftaConfig
from qrefta.model.prepared import prepared_config
from qrefta.model_card import write_card
from qrefta.nn.grid import level_table
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import QuantFormat, QuantizedWeight

_BASES: dict[LoraBase, str] = {
    "residual": "the residual, dequantized",
    "residual-4bit": "the residual in bitsandbytes' 4 bits",
}
_BASE_USE = "The LoRA in the folder above belongs to it; load both with PEFT."


def original_base(
    model: PreTrainedModel, source: str | Path | None
) -> tuple[PreTrainedModel, list[str]]:
    """The dense model that was prepared, with new heads if its checkpoint has none; and notes.

    Raises:
        ValueError: if the source is None or not the model that was prepared.
    """
    if source is None:
        raise ValueError(
            "The prepared model does not name the model that it was prepared from; give it as "
            "`original`."
        )
    model_class: Any = type(model)  # the annotation of from_pretrained knows no loading info
    bare, loaded = model_class.from_pretrained(
        **pretrained_source(source, is_trusted(model)),
        config=plain_config(model, model.dtype, None),
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    stored = {key: list(shape) for key, shape, *_ in loaded["mismatched_keys"]}
    _check_original(model, source, stored, set(loaded["missing_keys"]))
    notes = [
        f"{name} is {shape} in {source}: give the base the model's shape before PEFT loads the "
        "adapter (embeddings: resize_token_embeddings)"
        for name, shape in stored.items()
    ]
    return bare.to(model.device), notes


def _check_original(
    model: PreTrainedModel, source: str | Path, stored: dict[str, list[int]], missing: set[str]
) -> None:
    """Refuse an original that is without a tensor which the adapter does not hold either.

    Args:
        model: prepared.
        source: of the original.
        stored: shapes of the tensors that have another shape there.
        missing: names of the tensors that it does not have.

    Raises:
        ValueError: naming the tensor and both shapes.
    """
    config = prepared_config(model)
    for row in config.stacks:
        for path in row.stack.modules:
            if (path if row.stack.experts else f"{path}.weight") in stored.keys() | missing:
                raise ValueError(
                    f"{source} has no {path}.weight in the shape of the prepared model; give the "
                    "model that was prepared as `original`."
                )
    unusable = {name: f"{shape} in {source}" for name, shape in stored.items()}
    unusable |= dict.fromkeys(missing, f"missing in {source}")
    for tied, name in model.all_tied_weights_keys.items():
        if name in unusable:
            unusable.setdefault(tied, unusable[name])
    in_adapter = tuple(f"{path}." for path in config.settings.modules_to_save)
    for name, tensor in model.state_dict().items():
        if name in unusable and not name.startswith(in_adapter):
            raise ValueError(
                f"{name} is {list(tensor.shape)} in this model and {unusable[name]}, and the "
                "adapter does not hold it. It was added or resized after that model was loaded "
                "(for example by resize_token_embeddings). Save the dense model after that change "
                'and give its folder as `original`, or give base="residual", whose base holds it.'
            )


def residual_base(
    model: PreTrainedModel,
    config: QReftaConfig,
    folder: Path,
    base: LoraBase,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    """Write the residuals as a plain model, and load it.

    Args:
        model: prepared.
        config: of the model.
        folder: to make and write.
        base: "residual", dense, or "residual-4bit", in bitsandbytes' format.
        dtype: of the dense parameters.
        tokenizer: as for `qrefta.export_lora`.
    """
    folder.mkdir()
    write_card(folder, config, f"This is {_BASES[base]}, without the factors.", _BASE_USE)
    if base == "residual":
        write_model(model, folder, dtype, _residual_tensors, tokenizer=tokenizer)
        return _moved(type(model).from_pretrained(folder, dtype=dtype), model.device)
    dense = _kept_dense(model, config)
    fmt = QuantFormat.of(config.settings)
    assert fmt is not None, "settings were checked"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt.quant_type,
        bnb_4bit_use_double_quant=fmt.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(dense),
    )

    def stored(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
        # bitsandbytes does not quantize fused experts.
        if row.stack.experts or layer in dense.values():
            return _residual_tensors(layer, row)
        return _bnb_tensors(layer)

    write_model(model, folder, dtype, stored, quantization, tokenizer=tokenizer)
    return type(model).from_pretrained(folder, dtype=dtype, device_map={"": model.device})


def cast_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the tensors of a dense model's checkpoint as `from_pretrained(dtype=...)` does."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted_dtype(model, name, dtype))


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device."""
    untyped: Any = model  # type checkers lose `self` of PreTrainedModel.to in its decorator
    return untyped.to(device)


def _residual_tensors(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    residual = layer.residual(torch.float32)
    return {"weight": residual.T if row.stack.transposed else residual}


def _kept_dense(model: PreTrainedModel, config: QReftaConfig) -> dict[str, nn.Module]:
    """Linear layers that the bitsandbytes plug-in must leave alone, by path.

    They are not in 4 bits here, or the model may want them in float32 (T5's `wo`).
    """
    adapted = {path for row in config.stacks for path in row.stack.modules}
    dense: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path not in adapted:
            dense[path] = module
        wide = keeps_float32(model, f"{path}.weight", torch.float16)  # bitsandbytes asks no dtype
        if isinstance(module, AdaptedLinear) and wide:
            dense[path] = module
    return dense


def _bnb_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    """The tensors that bitsandbytes' Linear4bit saves, made of the residual's bytes."""
    weight = layer.frozen_weight()
    assert isinstance(weight, QuantizedWeight), "settings were checked"
    state = weight.bnb_state(torch.bfloat16)
    state.code = level_table(weight.format.quant_type).to(weight.codes.device)
    used_bytes = -(-layer.out_features * layer.in_features // 2)
    codes = weight.codes.view(torch.uint8)[:used_bytes].unsqueeze(1)
    tensors = {"weight": codes}
    for name, tensor in state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = tensor
    return tensors
