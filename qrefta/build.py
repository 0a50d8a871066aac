"""The modules of a prepared model: adapted layers in the place of linears, a factor bank at the root, what trains."""

from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel

from qrefta.config import QReftaConfig, StackRow
from qrefta.factors import BANK, FactorBank
from qrefta.linear import AdaptedLinear
from qrefta.methods import METHODS
from qrefta.stack import LayerStack, ends_with, read_weight, replace_module


def build(model: PreTrainedModel, config: QReftaConfig) -> None:
    """Replace the linears that `config` lists by empty `AdaptedLinear`s and add an empty factor bank.

    Raises:
        ValueError: if the config lists no stacks, or the model lacks one of the linears or has it in another shape.
    """
    if not config.stacks:
        raise ValueError("The checkpoint's quantization_config lists no stacks: config.json is damaged; restore it.")
    config.stacks = [_relocate(model, row) for row in config.stacks]
    for row in config.stacks:
        for path in row.modules:
            _check_linear(model, path, row)
    attach_bank(model)
    for index, row in enumerate(config.stacks):
        key = bank_key(index) if row.rank else None
        if key is not None:
            factors = METHODS[config.method](row.layers, *row.shape, row.rank, config.torch_factor_dtype)
            getattr(model, BANK)[key] = factors
        for layer, path in enumerate(row.modules):
            replace_linear(model, path, config, layer, key)


def model_class(name: str, source: str | Path) -> type[PreTrainedModel]:
    """The transformers class that a config names as its architecture.

    Raises:
        ValueError: if transformers has no such model class.
    """
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"transformers has no model class {name!r}; load {source} with the class that saved it.")
    return found


def bank_key(index: int) -> str:
    """Name of the factors of stack number `index`.

    Not the stack's own name: transformers renames keys on saving and loading by patterns that may match a part of it.
    """
    return f"stack{index}"


def attach_bank(model: PreTrainedModel) -> None:
    """Add an empty factor bank at the root; its masters keep float32 whatever dtype the model is loaded in."""
    setattr(model, BANK, FactorBank())
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), BANK}


def replace_linear(
    model: PreTrainedModel, path: str, config: QReftaConfig, layer: int, key: str | None
) -> AdaptedLinear:
    """Put an empty `AdaptedLinear` in the place of a linear, attached to the bank's factors `key` if there are any."""
    old = model.get_submodule(path)
    out_features, in_features = read_weight(old).shape
    with old.weight.device:
        new = AdaptedLinear(in_features, out_features, old.bias is not None, config.format, old.weight.dtype)
    if key is not None:
        new.attach(getattr(model, BANK), key, layer)
    replace_module(model, path, new.train(old.training))
    return new


def freeze(model: PreTrainedModel, modules_to_save: list[str]) -> None:
    """Freeze everything but the factors' trained numbers and the modules in `modules_to_save` that the model has."""
    model.requires_grad_(False)
    for factors in getattr(model, BANK).values():
        for parameter in factors.trained():
            parameter.requires_grad_(True)
    modules = dict(model.named_modules())
    for path in modules_to_save:
        if path in modules:
            modules[path].requires_grad_(True)


def task_head(model: PreTrainedModel) -> list[str]:
    """Top-level modules that make a task head: they lie outside the base model and are no language model's output.

    Where a class does not name its base model (`WhisperForAudioClassification`), a head is what holds parameters, but
    neither repeated blocks nor embeddings.
    """
    output = model.get_output_embeddings()
    if model.base_model is model:
        if output is not None or "For" not in type(model).__name__:
            return []
        body = (nn.ModuleList, nn.Embedding)
        heads = {
            name for name, child in model.named_children() if not any(isinstance(m, body) for m in child.modules())
        }
    else:
        heads = {name for name, child in model.named_children() if child is not model.base_model}
    return [
        name
        for name, child in model.named_children()
        if name in heads and name != BANK and output not in list(child.modules()) and list(child.parameters())
    ]


def trained_modules(model: PreTrainedModel, names: list[str], stacks: list[LayerStack]) -> list[str]:
    """Paths of the modules that train whole: the task head, and those that `names` gives."""
    paths = [path for path, _ in model.named_modules() if path]
    unmatched = [name for name in names if not any(ends_with(path, name) for path in paths)]
    if unmatched:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {unmatched} match no module; at the top there are: {children}")
    named = [path for path in paths if any(ends_with(path, name) for name in names)]
    for path in named:
        if any(f"{packed}.".startswith(f"{path}.") for stack in stacks for packed in stack.modules):
            raise ValueError(
                f"modules_to_save names {path}, which is or holds linears that are quantized; they cannot train whole. "
                "Give them factors with target_modules instead."
            )
    return list(dict.fromkeys(task_head(model) + named))


def _relocate(model: PreTrainedModel, row: StackRow) -> StackRow:
    """A row with the paths of this class: a base model has them without the prefix that a model with a head has."""
    prefix = f"{model.base_model_prefix}."
    if _has(model, prefix + row.modules[0]):
        return replace(row, stack=prefix + row.stack, modules=[prefix + path for path in row.modules])
    if not _has(model, row.modules[0]):
        bare = [path.removeprefix(prefix) for path in row.modules]
        return replace(row, stack=row.stack.removeprefix(prefix), modules=bare)
    return row


def _has(model: PreTrainedModel, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _check_linear(model: PreTrainedModel, path: str, row: StackRow) -> None:
    try:
        module = model.get_submodule(path)
        shape = list(module.weight.shape)
    except AttributeError:
        raise ValueError(
            f"The checkpoint was prepared on a model that has {path}; {type(model).__name__} has no such linear. "
            "Load it with the class that saved it (qrefta.load does)."
        ) from None
    wanted = row.shape[::-1] if row.transposed else row.shape
    if shape != list(wanted):
        raise ValueError(f"{path} has the shape {shape}, but the checkpoint was prepared with {list(wanted)}.")
