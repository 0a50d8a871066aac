"""The modules of a prepared model: adapted layers in the place of linears, a factor bank at the root, what trains."""

from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel

from qrefta._compat.transformers import always_float32, set_always_float32
from qrefta.config import QReftaConfig, StackRow
from qrefta.methods import METHODS
from qrefta.model.stacks import LayerStack, ends_with, read_slice, replace_module
from qrefta.nn.experts import add_expert
from qrefta.nn.factors import BANK, FactorBank, frozen
from qrefta.nn.linear import AdaptedLinear


def build(model: PreTrainedModel, config: QReftaConfig) -> None:
    """Replace the linears that `config` lists by empty `AdaptedLinear`s and add an empty factor bank.

    Raises:
        ValueError: if the config lists no stacks, or the model lacks one of the linears or has it in another shape.
    """
    if not config.stacks:
        raise ValueError(
            "The checkpoint's quantization_config lists no stacks: config.json is damaged; restore it."
        )
    config.stacks = [_relocate(model, row) for row in config.stacks]
    for row in config.stacks:
        for path in row.modules:
            _check_weight(model, path, row)
    attach_bank(model)
    for index, row in enumerate(config.stacks):
        key = bank_key(index) if row.rank else None
        if key is not None:
            factors = METHODS[config.method](
                row.layers, *row.shape, row.rank, config.torch_factor_dtype
            )
            getattr(model, BANK)[key] = factors
        stack = row.layer_stack
        for place in range(stack.layers):
            adapt(model, stack, place, config, key)


def model_class(name: str, source: str | Path) -> type[PreTrainedModel]:
    """The transformers class that a config names as its architecture.

    Raises:
        ValueError: if transformers has no such model class.
    """
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"transformers has no model class {name!r}; load {source} with the class that saved it."
        )
    return found


def bank_key(index: int) -> str:
    """Name of the factors of stack number `index`.

    Not the stack's own name: transformers renames keys on saving and loading by patterns that may match a part of it.
    """
    return f"stack{index}"


def attach_bank(model: PreTrainedModel) -> None:
    """Add an empty factor bank at the root; its masters keep float32 whatever dtype the model is loaded in."""
    setattr(model, BANK, FactorBank())
    set_always_float32(model, always_float32(model) | {BANK})


def adapt(
    model: PreTrainedModel, stack: LayerStack, index: int, config: QReftaConfig, key: str | None
) -> AdaptedLinear:
    """Put an `AdaptedLinear` in the place of weight number `index` of a stack, attached to the bank's factors `key`.

    Its weight is empty, its bias the old one. Experts must come in order: a fused parameter goes with its last.
    """
    weight, (path, _) = read_slice(model, stack, index), stack.place(index)
    owner, _, name = path.rpartition(".")
    old = model.get_submodule(owner if stack.experts else path)
    bias = None if stack.experts else old.bias
    with weight.device:
        new = AdaptedLinear(
            stack.in_features, stack.out_features, bias is not None, config.format, weight.dtype
        )
    if bias is not None:
        new.bias = frozen(bias.detach())
    if key is not None:
        new.attach(getattr(model, BANK), key, index)
    new.train(old.training)
    if stack.experts:
        add_expert(old, name, new)
    else:
        replace_module(model, path, new)
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
            name
            for name, child in model.named_children()
            if not any(isinstance(m, body) for m in child.modules())
        }
    else:
        heads = {name for name, child in model.named_children() if child is not model.base_model}
    return [
        name
        for name, child in model.named_children()
        if name in heads
        and name != BANK
        and output not in list(child.modules())
        and list(child.parameters())
    ]


def trained_modules(
    model: PreTrainedModel, names: list[str], stacks: list[LayerStack]
) -> list[str]:
    """Paths of the modules that train whole: the task head, and those that `names` gives."""
    paths = [path for path, _ in model.named_modules() if path]
    unmatched = [name for name in names if not any(ends_with(path, name) for path in paths)]
    if unmatched:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"modules_to_save {unmatched} match no module; at the top there are: {children}"
        )
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
    if _has(model, row, prefix + row.modules[0]):
        return replace(
            row, stack=prefix + row.stack, modules=[prefix + path for path in row.modules]
        )
    if not _has(model, row, row.modules[0]):
        bare = [path.removeprefix(prefix) for path in row.modules]
        return replace(row, stack=row.stack.removeprefix(prefix), modules=bare)
    return row


def _has(model: PreTrainedModel, row: StackRow, path: str) -> bool:
    try:
        _stored_shape(model, row, path)
    except AttributeError:
        return False
    return True


def _stored_shape(model: PreTrainedModel, row: StackRow, path: str) -> list[int]:
    """Shape of a linear's weight, or of a fused parameter, as the model has it; AttributeError if it has none."""
    return list(
        (model.get_parameter(path) if row.experts else model.get_submodule(path).weight).shape
    )


def _check_weight(model: PreTrainedModel, path: str, row: StackRow) -> None:
    try:
        shape = _stored_shape(model, row, path)
    except AttributeError:
        raise ValueError(
            f"The checkpoint was prepared on a model that has {path}; {type(model).__name__} has no such linear. "
            "Load it with the class that saved it (qrefta.load does)."
        ) from None
    wanted = [
        *([row.experts] if row.experts else []),
        *(row.shape[::-1] if row.transposed else row.shape),
    ]
    if shape != wanted:
        raise ValueError(
            f"{path} has the shape {shape}, but the checkpoint was prepared with {wanted}."
        )
