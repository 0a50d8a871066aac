"""What a prepared checkpoint must be: checked before a tensor of it takes memory, and again once all are read.

transformers makes the model that config.json describes and then fills it; what the files do not fill it draws at
random. So sizes are compared between config and files first, where numbers out of a damaged config still cost nothing.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrefta._compat.transformers import was_initialized
from qrefta.config import QReftaConfig
from qrefta.files.safetensors import Checkpoint
from qrefta.model.names import sources
from qrefta.nn.experts import is_adapted
from qrefta.nn.factors import Factors, frozen
from qrefta.nn.linear import AdaptedLinear

_LARGEST_COUNT = 100_000  # of blocks or classes; transformers makes a list or a module of each before it reads a file
_MOST_BLOCKS = 2_000
FRESH_BYTES, FRESH_SHARE = (
    1 << 30,
    4,
)  # what a model may hold beyond its files: a new head, tables of positions
_COUNTED = re.compile(r"(^|_)(layers?|blocks?|stages?|depths?)$|^num_labels$")
_WINDOW = re.compile(r"window|mtp|nextn")  # numbers of layers that no loop runs over


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config.json whose model would be built for ever, or from code that transformers fetches from a hub.

    A flipped digit makes a million blocks of twelve. An attention or experts implementation with a slash in its name
    is a hub's kernel; who wants one passes `attn_implementation`.

    Raises:
        ValueError: naming the setting.
    """
    check_counts(config)
    for name, value in _settings(config):
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"config.json has {name} {value!r}, which is code from a hub; remove it, and pass "
                "attn_implementation=... to load it all the same."
            )


def check_counts(config: dict[str, Any]) -> None:
    """Refuse a config whose model would be built for ever.

    Raises:
        ValueError: naming the setting.
    """
    for name, count in _counts(config):
        limit = _LARGEST_COUNT if name == "num_labels" else _MOST_BLOCKS
        if count > limit:
            raise ValueError(
                f"config.json has {name} {count:,}, and {limit:,} is the largest that is built; it is damaged: copy or "
                "save it again."
            )


def _counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Settings that count modules or classes."""
    for name, value in _settings(config):
        if _COUNTED.search(name) and not _WINDOW.search(name):
            yield from (
                (name, one)
                for one in (value if isinstance(value, list) else [value])
                if _is_number(one)
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, of nested configs too."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _settings(value)
        else:
            yield str(name), value


def check_rows(config: QReftaConfig) -> None:
    """Refuse rows whose factors are of another number of layers than they name.

    Raises:
        ValueError: naming the stack.
    """
    for row in config.stacks:
        if row.layers != row.layer_stack.layers:
            raise ValueError(
                f"config.json has {row.layers} layers for the {row.layer_stack.layers} weights of {row.stack}; it is "
                "damaged: restore it from the folder that save_pretrained wrote."
            )


def check_files(files: list[str], source: str | Path | None) -> None:
    """Refuse all but whole safetensors files in the folder that is loaded, before a byte of a tensor is read.

    Args:
        files: as transformers found them, by an index that may name anything.
        source: the folder; None, or a hub name, where the files are transformers' own.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file} is not a safetensors file; qrefta reads no other format (pickle can run code)."
            )
        if source is not None and os.path.isdir(source):
            inside = os.path.relpath(os.path.abspath(file), os.path.abspath(source))
            if inside.startswith(os.pardir):
                raise ValueError(
                    f"{file} is outside {source}: the index is damaged or hostile; it is refused."
                )
        if not os.path.isfile(file):
            raise ValueError(
                f"{file} is damaged or truncated: it is missing, or no file at all; copy or save it again."
            )
        try:
            Checkpoint.of_files([file])
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged or truncated ({error}); copy or save it again."
            ) from error


def check_headers(model: PreTrainedModel, files: list[str]) -> None:
    """Compare what the files say that they hold with an empty model, adapted layers and bank included.

    Raises:
        ValueError: if a tensor of an adapted layer or of the factors has another shape or another kind of numbers, the
            model would hold far more than the files do, or transformers read far more than the model holds.
    """
    checkpoint = Checkpoint.of_files(files)
    found, own = sources(model, checkpoint), own_parameters(model)
    fresh = spare = total = 0
    seen = set()
    for path, tensor in [
        *model.state_dict(keep_vars=True).items(),
        *model.named_non_persistent_buffers(),
    ]:
        names = found.get(path, [])
        name = names[0][0] if len(names) == 1 and len(names[0]) == 1 else None
        if path in own and name is not None:
            _check_own(path, tensor, checkpoint, name)
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        total += tensor.numel() * tensor.itemsize
        if not names or (name is not None and checkpoint.shape(name) != tensor.shape):
            fresh += tensor.numel() * tensor.itemsize
            spare += (
                0 if name is None else checkpoint.nbytes(name)
            )  # read before its shape is compared
    held = sum(os.path.getsize(file) for file in files)
    if fresh > max(FRESH_BYTES, FRESH_SHARE * held):
        raise ValueError(
            f"config.json describes {fresh / 1e9:.1f} GB of tensors that the files ({held / 1e9:.3f} GB) do not hold; "
            "they do not belong together: copy or save the folder again."
        )
    if spare > max(FRESH_BYTES, FRESH_SHARE * total):
        raise ValueError(
            f"The files hold {spare / 1e9:.1f} GB of tensors in other shapes than config.json describes "
            f"({total / 1e9:.3f} GB in all); they do not belong together: copy or save the folder again."
        )


def _check_own(path: str, tensor: Tensor, checkpoint: Checkpoint, name: str) -> None:
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    if shape != tensor.shape:
        raise _other_shape(path, shape, tensor.shape)
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        raise ValueError(
            f"{path} is {dtype} in the checkpoint and {tensor.dtype} by its config; they do not belong together: copy "
            "or save it again."
        )


def _other_shape(path: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{path} has the shape {list(found)} in the checkpoint and {list(expected)} by its config; they do not belong "
        "together: copy or save it again."
    )


def own_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters of adapted layers and factors, by path; biases are the model's."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear | Factors)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias"
    }


def check_form(model: PreTrainedModel, expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raise if a tensor was loaded in another shape, and undo casts of packed bytes.

    transformers 5.0 neither compares shapes in quantized models nor leaves integers alone in modules that it
    keeps in float32 (T5's `wo`); bytes survive that cast.
    """
    for path, parameter in own_parameters(model).items():
        shape, dtype = expected[path]
        if parameter.shape != shape:
            raise _other_shape(path, parameter.shape, shape)
        if parameter.dtype != dtype and not dtype.is_floating_point:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, frozen(parameter.to(dtype)))


def check_filled(model: PreTrainedModel) -> None:
    """Raise if the checkpoint lacked one of our tensors; transformers only warns and leaves it random.

    In the class that saved the checkpoint no other tensor may lack either; another class may have a fresh head.
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    missing, offloaded = [], []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = isinstance(module, AdaptedLinear | Factors) or is_adapted(module)
            if (ours or same_class) and not was_initialized(parameter):
                (offloaded if parameter.is_meta else missing).append(f"{path}.{name}")
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} tensors were offloaded to disk ({offloaded[0]}, ...), which a prepared model does not "
            "support; use a device_map without disk."
        )
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors that its config lists: {', '.join(missing[:5])}. "
            "It is damaged or incomplete: copy or save it again."
        )


def check_scales(model: PreTrainedModel) -> None:
    """Raise if frozen float32 numbers, stored as raw bytes, are NaN or infinite: scales and mixing weights.

    Preparing makes none from finite weights. One pass over a sixteenth of the packed weights, or less.
    """
    own = own_parameters(model)
    for path, parameter in own.items():
        codes = f"{path}_state" in own  # scales in 8 bits; their own scales are beside them
        if (
            parameter.dtype == torch.uint8
            and not codes
            and not torch.isfinite(parameter.view(torch.float32)).all()
        ):
            raise ValueError(
                f"{path} holds NaN or infinite numbers; it is damaged: copy or save it again."
            )
