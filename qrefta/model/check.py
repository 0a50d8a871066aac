"""Checks of a prepared checkpoint, before its tensors take memory and again after they are read.

transformers builds the model that config.json describes and then fills it. Tensors that the files
do not hold are drawn at random. So config and files are compared first, before wrong numbers in a
damaged config can cost memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrefta._compat.transformers import is_left_out, was_initialized
from qrefta.config.stack import BANK
from qrefta.files.header import read_checksums
from qrefta.files.safetensors import Checkpoint
from qrefta.model.names import sources
from qrefta.nn.experts import is_adapted
from qrefta.nn.factors import Factors, frozen
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.packed_parameters import pack

# A model may hold this much beyond its files, as bytes or as a multiple of them: a new head, tables
# of positions.
FRESH_BYTES = 1 << 30
FRESH_SHARE = 4


def check_in_memory(model: nn.Module, fix: str) -> None:
    """Refuse a model with parameters on the meta device, which hold no values.

    Args:
        model: dense or prepared.
        fix: a sentence for the error message.

    Raises:
        ValueError: naming the first of them.
    """
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} parameters are on the meta device ({absent[0]}, ...): the model has no "
            f"weights, or accelerate or a device_map offloads them. {fix}"
        )


def check_files(files: list[str], source: str | Path | None) -> None:
    """Refuse files that are not whole safetensors files in the folder that is loaded.

    No byte of a tensor is read.

    Args:
        files: as transformers found them, by an index that may name any path.
        source: the folder; None, or a hub name, where transformers placed the files itself.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file} is not a safetensors file; qrefta reads no other format (pickle can run "
                "code)."
            )
        if source is not None and os.path.isdir(source):
            inside = os.path.relpath(os.path.abspath(file), os.path.abspath(source))
            if inside.startswith(os.pardir):
                raise ValueError(
                    f"{file} is outside {source}: the index is damaged or hostile; it is refused."
                )
        if not os.path.isfile(file):
            raise ValueError(
                f"{file} is damaged or truncated: it is missing or is not a file; copy or save it "
                "again."
            )
        try:
            Checkpoint.of_files([file])
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged or truncated ({error}); copy or save it again."
            ) from error


def check_whole_model(files: list[str]) -> None:
    """Refuse files of a dense model, or of a part of a prepared one, that took its config.

    Args:
        files: of a folder whose config.json describes factors.

    Raises:
        ValueError: if no file holds factors, or was saved as a prepared model.
    """
    names = Checkpoint.of_files(files).names
    saved = any(read_checksums(Path(file)) for file in files)
    if not saved and not any(name.startswith(f"{BANK}.") for name in names):
        raise ValueError(
            f"{Path(files[0]).parent} holds no factors, and its config.json describes a prepared "
            "model. A model that is made from a prepared model's config is dense, and a part of a "
            "prepared model, such as model.model, has no factors; both save its "
            "quantization_config. Save the prepared model itself, or, for a dense model, remove "
            "quantization_config from its config (del model.config.quantization_config) and from "
            "config.json."
        )


def check_headers(model: PreTrainedModel, files: list[str]) -> set[str]:
    """Compare the headers of files with an empty model, its adapted layers and bank included.

    Returns:
        Paths of the dense tensors that the files hold in another shape. transformers refuses them,
        or draws them at random if it is asked to (`ignore_mismatched_sizes=True`).

    Raises:
        ValueError: if a tensor of an adapted layer or of the factors has another shape or another
            kind of numbers, the model would hold far more than the files do, or transformers would
            read far more than the model holds.
    """
    checkpoint = Checkpoint.of_files(files)
    names = _single_sources(model, checkpoint)
    found = sources(model, checkpoint)
    adapted = adapted_parameters(model)
    reshaped: set[str] = set()
    fresh = 0  # bytes that no file fills
    spare = 0  # bytes that are read before their shape is compared
    total = 0
    for path, tensor in _distinct_tensors(model):
        nbytes = tensor.numel() * tensor.itemsize
        total += nbytes
        name = names.get(path)
        if name is not None and path in adapted:
            _check_adapted(path, tensor, checkpoint, name)
        if name is not None and checkpoint.shape(name) != tensor.shape:
            reshaped.add(path)
            fresh += nbytes
            spare += checkpoint.nbytes(name)
        elif not found.get(path):
            fresh += nbytes
    held = sum(os.path.getsize(file) for file in files)
    if fresh > max(FRESH_BYTES, FRESH_SHARE * held):
        raise ValueError(
            f"config.json describes {fresh / 1e9:.1f} GB of tensors that the files "
            f"({held / 1e9:.3f} GB) do not hold; they do not belong together: copy or save the "
            "folder again."
        )
    if spare > max(FRESH_BYTES, FRESH_SHARE * total):
        raise ValueError(
            f"The files hold {spare / 1e9:.1f} GB of tensors in other shapes than config.json "
            f"describes ({total / 1e9:.3f} GB in all); they do not belong together: copy or save "
            "the folder again."
        )
    return reshaped


def missing_tensors(model: PreTrainedModel, files: list[str]) -> list[str]:
    """Paths of the tensors in an empty model that no file fills; one of tied tensors is enough.

    Tensors that the model's class leaves out of its files are not missing.
    """
    found = sources(model, Checkpoint.of_files(files))
    state = model.state_dict(keep_vars=True)
    filled = {id(tensor) for path, tensor in state.items() if found.get(path)}
    adapted = adapted_parameters(model)
    return [
        path
        for path, tensor in state.items()
        if id(tensor) not in filled and (path in adapted or not is_left_out(model, path))
    ]


def check_stored_scales(model: PreTrainedModel, files: list[str]) -> None:
    """Raise if scales or mixing weights in the files are NaN or infinite.

    Args:
        model: empty, with its adapted layers and bank.
        files: its checkpoint.
    """
    checkpoint = Checkpoint.of_files(files)
    names = _single_sources(model, checkpoint)
    for path in _raw_floats(adapted_parameters(model)):
        if path in names:
            _check_finite(path, checkpoint.read(names[path]))


def _single_sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor of the checkpoint for each tensor of the model that is filled by exactly one."""
    return {
        path: names[0][0]
        for path, names in sources(model, checkpoint).items()
        if len(names) == 1 and len(names[0]) == 1
    }


def _distinct_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model; only the first of tied tensors."""
    seen = set()
    state = model.state_dict(keep_vars=True)
    for path, tensor in [*state.items(), *model.named_non_persistent_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield path, tensor


def _check_adapted(path: str, tensor: Tensor, checkpoint: Checkpoint, name: str) -> None:
    shape = checkpoint.shape(name)
    dtype = checkpoint.dtype(name)
    if shape != tensor.shape:
        raise _other_shape(path, shape, tensor.shape)
    both_float = dtype.is_floating_point and tensor.is_floating_point()
    if dtype != tensor.dtype and not both_float:
        raise ValueError(
            f"{path} is {dtype} in the checkpoint and {tensor.dtype} by its config; they do not "
            "belong together: copy or save it again."
        )


def _other_shape(path: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{path} has the shape {list(stored)} in the checkpoint and {list(expected)} by its "
        "config; they do not belong together: copy or save it again."
    )


def adapted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of adapted layers and factors, by path.

    Biases are left out: the dense model has them too.
    """
    parameters = {}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear | Factors):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "bias":
                    parameters[f"{path}.{name}"] = parameter
    return parameters


def check_form(model: PreTrainedModel, expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raise if a tensor was loaded in another shape, and undo casts of packed bytes.

    transformers 5.0 neither compares shapes in quantized models nor leaves integers alone in
    modules that it keeps in float32 (T5's `wo`); bytes survive that cast.
    """
    for path, parameter in adapted_parameters(model).items():
        shape, dtype = expected[path]
        if parameter.shape != shape:
            raise _other_shape(path, parameter.shape, shape)
        if dtype.is_floating_point:
            continue
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if parameter.dtype != dtype:
            setattr(module, name, frozen(parameter.to(dtype)))
        pack(module, [name])


def check_filled(model: PreTrainedModel, reshaped: set[str]) -> None:
    """Raise if a tensor of an adapted layer or of the factors is missing in the checkpoint.

    transformers only warns, and leaves the tensor random. In the class that saved the checkpoint no
    other tensor may be missing either, unless the class leaves it out of its files; another class
    may have a new head. transformers marks each tensor that it filled with `_is_hf_initialized`,
    the only trace left after loading.

    Args:
        model: loaded.
        reshaped: paths that may be unfilled; see `check_headers`.
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    missing = []
    offloaded = []
    for path, module in model.named_modules():
        ours = isinstance(module, AdaptedLinear | Factors) or is_adapted(module)
        if not (ours or same_class):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            left_out = full_name in reshaped or (not ours and is_left_out(model, full_name))
            if not was_initialized(parameter) and not left_out:
                problems = offloaded if parameter.is_meta else missing
                problems.append(full_name)
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} tensors were offloaded to disk ({offloaded[0]}, ...), which a "
            "prepared model does not support; use a device_map without disk."
        )
    if missing:
        raise missing_error(missing)


def missing_error(missing: list[str]) -> ValueError:
    return ValueError(
        f"{len(missing)} tensors that config.json describes are missing in the checkpoint: "
        f"{', '.join(missing[:5])}. It is damaged or incomplete: copy or save it again. If a "
        "module was replaced before saving, such as a head by several layers, the class cannot "
        "build it: make the model as it was made then, and call load_state_dict."
    )


def check_scales(model: PreTrainedModel) -> None:
    """Raise if scales or mixing weights are NaN or infinite.

    Preparing finite weights never makes them so.
    """
    parameters = adapted_parameters(model)
    for path in _raw_floats(parameters):
        _check_finite(path, parameters[path])


def _raw_floats(parameters: dict[str, nn.Parameter]) -> Iterator[str]:
    """Paths of float32 numbers that are stored as raw bytes.

    Scales in 8 bits are left out: they have scales themselves.
    """
    for path, parameter in parameters.items():
        if parameter.dtype == torch.uint8 and f"{path}_state" not in parameters:
            yield path


def _check_finite(path: str, stored: Tensor) -> None:
    if not torch.isfinite(stored.detach().view(torch.float32)).all():
        raise ValueError(
            f"{path} holds NaN or infinite numbers; it is damaged: copy or save it again."
        )
