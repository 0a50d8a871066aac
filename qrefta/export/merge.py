"""A prepared model back to a plain transformers model: in place, or written to a folder a tensor at a time."""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta._compat.transformers import (
    always_float32,
    float32_under_float16,
    revert_weight_conversion,
    set_always_float32,
    unmark_quantized,
)
from qrefta.config import StackReport
from qrefta.export.compare import example_inputs, output_difference, outputs, run_from_disk
from qrefta.files.safetensors import (
    SINGLE,
    ShardWriter,
    copy_companions,
    replace_text,
    resolve_folder,
    write_index,
)
from qrefta.hf_quantizer import prepared_config
from qrefta.model.stacks import replace_module
from qrefta.model_card import write_card
from qrefta.nn.experts import expert_path, restore_fused
from qrefta.nn.factors import BANK
from qrefta.nn.linear import AdaptedLinear

# Relative difference of logits that rounding to bf16 may make: 0.012 on small random models; on MiniLM trained on SST-2
# 0.005 on its text and 0.053 on random tokens. A wrong merge is off by 1 and more.
ROUNDING_TOLERANCE = 0.15

_USE = "Load it as any transformers model; it needs no qrefta."

Stored = Callable[[AdaptedLinear, StackReport], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: what to load.
        difference: ||logits - the prepared model's|| / ||the prepared model's||, of the folder as it loads.
        weight_error: squared norm of what an update lacks, relative to the update it stands for; 0 where it lacks none.
        notes: what a server needs to be told, or will refuse.
    """

    folder: Path
    difference: float
    weight_error: float = 0.0
    notes: list[str] = field(default_factory=list)


def merge(
    model: PreTrainedModel,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float = ROUNDING_TOLERANCE,
    max_shard_size: int | str = "2GB",
) -> PreTrainedModel | Export:
    """The same model with plain dense linears, W_l = dequant(Q_l) + Delta_l, in `dtype` throughout.

    Without `out` it works in place and layer by layer: no second copy of the model is held. With `out` the model stays
    as it is, and the dense one is written there, tokenizer included, a tensor at a time: beside the model there is
    never more than a shard and a linear in float32. The folder is then run from disk, module by module, to compare its
    logits, and takes its name only if they agree. The weights are summed in float32 and rounded once, so the result
    differs from the prepared model by the rounding of parameters to `dtype` only. Experts are fused again, and computed
    as transformers does by default.

    Args:
        model: prepared.
        dtype: of the dense parameters.
        out: folder to write; new or empty.
        inputs: a batch to compare logits on; default: see `qrefta.export.compare.example_inputs`.
        tolerance: relative difference of the logits beyond which nothing is written.
        max_shard_size: bytes of one file, or text such as "5GB".

    Raises:
        ValueError: if the model is not prepared, `dtype` is not a floating type, `out` is not empty, or the logits
            differ by more than `tolerance`.
    """
    config = prepared_config(model)
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {dtype}; it must be a floating type such as torch.bfloat16 or torch.float32"
        )
    if out is not None:
        with new_folder(out) as folder:
            write_model(model, folder, dtype, dense_tensors, max_shard_size=max_shard_size)
            difference = _check_folder(model, folder, dtype, inputs, tolerance)
            write_card(folder, config, f"It was merged to dense {_name(dtype)} weights.", _USE)
        return Export(Path(out), difference)
    for row in config.stacks:
        for path in row.stack.modules:
            if row.stack.experts:
                _restore_experts(model, path, row.stack.experts, _wanted_dtype(model, path, dtype))
            else:
                layer = model.get_submodule(path)
                replace_module(model, path, _dense_linear(layer, row).train(layer.training))
    delattr(model, BANK)
    set_always_float32(model, always_float32(model) - {BANK})
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            unmark_quantized(module.config)
            module.config.dtype = dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_wanted_dtype(model, name, dtype))
    return model.requires_grad_(True)


def check_new(out: str | Path) -> Path:
    """The folder's path, if there is nothing in it.

    Raises:
        ValueError: if it exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it.")
    return out


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write to, that gets the name `out` once all went well, and is removed otherwise.

    Raises:
        ValueError: if `out` exists and is not empty.
    """
    out = check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's own is for one user
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_model(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    stored: Stored,
    quantization: QuantizationConfigMixin | None = None,
    max_shard_size: int | str = "2GB",
) -> None:
    """Write a prepared model as a plain transformers folder, a tensor at a time, with the tokenizer it came with.

    Args:
        folder: empty.
        dtype: of all but what `stored` gives in another form, and what the model wants in float32.
        stored: the tensors of an adapted linear but for its bias, by their names in the module.
        quantization: the config that makes transformers load what `stored` gives.
    """
    stacks = prepared_config(model).stacks
    rows = {path: row for row in stacks for path in row.stack.adapted}
    fused = {
        expert_path(path, 0): path
        for row in stacks
        if row.stack.experts
        for path in row.stack.modules
    }
    writer = ShardWriter(folder, "model-", convert_file_size_to_int(max_shard_size))
    for path, name, tensor in _tensors(model):
        if path in rows and rows[path].experts:
            if (
                path in fused and name == "weight"
            ):  # the first expert's: all of them are one parameter
                _add(
                    writer,
                    model,
                    fused[path],
                    _fused(model, fused[path], rows[path], dtype, stored),
                )
        elif path in rows and name == "weight":
            for key, value in stored(model.get_submodule(path), rows[path]).items():
                wanted = (
                    _wanted_dtype(model, f"{path}.{key}", dtype)
                    if value.is_floating_point()
                    else value.dtype
                )
                keep = (
                    quantization is not None and key != "weight"
                )  # scales are float32, whatever the model is
                _add(writer, model, f"{path}.{key}", value if keep else value.to(wanted))
        elif path not in rows or name == "bias":
            full = f"{path}.{name}" if path else name
            wanted = (
                _wanted_dtype(model, full, dtype)
                if isinstance(tensor, nn.Parameter)
                else tensor.dtype
            )
            _add(writer, model, full, tensor.to(wanted) if tensor.is_floating_point() else tensor)
    files = writer.close()
    if len(files) == 1:
        (folder / files[0]).rename(folder / SINGLE)
    else:
        write_index(folder, files)
    copy_tokenizer(model, folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    replace_text(
        folder / "config.json",
        plain_config(model, dtype, quantization).to_json_string(use_diff=True),
    )


def _fused(
    model: PreTrainedModel, path: str, row: StackReport, dtype: torch.dtype, stored: Stored
) -> Tensor:
    """The parameter of all experts of a block, in its final dtype."""
    layers = (model.get_submodule(expert_path(path, expert)) for expert in range(row.stack.experts))
    wanted = _wanted_dtype(model, path, dtype)
    return torch.stack([stored(layer, row)["weight"].to(wanted) for layer in layers])


def dense_tensors(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    """The merged weight as the linear that was replaced stores it."""
    weight = layer.dense_weight()
    return {"weight": weight.T if row.stack.transposed else weight}


def plain_config(
    model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationConfigMixin | None
) -> Any:
    """The model's config without what preparing added."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    unmark_quantized(config)
    if quantization is not None:
        config.quantization_config = quantization
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    return config


def copy_tokenizer(model: PreTrainedModel, folder: Path) -> None:
    """Copy the tokenizer, and what else lies beside the weights that a model was loaded from, where it was."""
    if model.name_or_path:
        with suppress(ValueError):  # made in this process, and neither a folder nor on the hub
            copy_companions(resolve_folder(model.name_or_path, weights=False), folder)


def agreed(difference: float, tolerance: float, mend: str) -> float:
    """`difference`, if it is within `tolerance`.

    Raises:
        ValueError: if it is not.
    """
    if difference <= tolerance:
        return difference
    raise ValueError(
        f"The logits of what was written differ from the prepared model's by {difference:.3g} of their size, and "
        f"{tolerance:g} are allowed; nothing was kept. {mend}"
    )


def _check_folder(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    inputs: Mapping[str, Any] | None,
    tolerance: float,
) -> float:
    """The difference of the logits of a dense folder, read from disk module by module as the model runs."""
    inputs = example_inputs(model) if inputs is None else inputs
    difference = output_difference(
        outputs(run_from_disk(type(model), folder, dtype), inputs), outputs(model, inputs)
    )
    mend = "Give inputs that the model was made for, a wider dtype, or a larger tolerance."
    return agreed(difference, tolerance, mend)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """Module path, name and tensor of all that a checkpoint holds but the factors; tied ones once."""
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        path, _, name = key.rpartition(".")
        if id(tensor) not in seen and key.split(".")[0] != BANK:
            seen.add(id(tensor))
            yield path, name, tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor


def _add(writer: ShardWriter, model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Write a tensor under the names, and in the form, that the architecture's published checkpoints have."""
    for key, value in revert_weight_conversion(model, {name: tensor.detach()}).items():
        writer.add(key, value)


def _wanted_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that from_pretrained(dtype=...) gives a parameter: float32 for what the model wants so.

    Buffers keep theirs: a rounded `inv_freq` turns positions far out by whole radians.
    """
    kept = always_float32(model)
    if dtype == torch.float16:
        kept |= float32_under_float16(model)
    return torch.float32 if kept.intersection(name.split(".")) and dtype.itemsize < 4 else dtype


def _restore_experts(model: PreTrainedModel, path: str, count: int, dtype: torch.dtype) -> None:
    """A fused parameter in the place of the linears of its experts, at its final dtype: it may be very large."""
    owner, _, name = path.rpartition(".")
    layers = (model.get_submodule(expert_path(path, expert)) for expert in range(count))
    restore_fused(
        model.get_submodule(owner), name, (layer.dense_weight() for layer in layers), dtype
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_linear(layer: AdaptedLinear, row: StackReport) -> nn.Module:
    """A `Linear` (or `Conv1D`, which stores its weight transposed) with the layer's merged float32 weight and bias."""
    with torch.device("meta"):
        dense = (
            Conv1D(layer.out_features, layer.in_features)
            if row.stack.transposed
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    dense.weight = nn.Parameter(dense_tensors(layer, row)["weight"].contiguous())
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach())
    return dense
