"""The modules of a prepared model: adapted linear layers, the factor bank, and trained modules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from qrefta._compat.transformers import (
    always_float32,
    mark_initialized,
    set_always_float32,
)
from qrefta.choices import QuantType
from qrefta.config.rank import Rank
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK, LayerStack
from qrefta.methods import METHODS
from qrefta.model.replace import replace_module
from qrefta.model.stacks import ends_with
from qrefta.model.weights import linear_layer, read_slice
from qrefta.nn.bank import FactorBank
from qrefta.nn.experts import add_expert
from qrefta.nn.factors import factor_dtype, frozen
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import QuantFormat


class Placement(NamedTuple):
    """A stack to build.

    Attributes:
        stack: linear layers that the model has.
        rank: rank of the factors; 0 for a stack without factors.
        quant_type: format of the weights; None with 16 bits.
        layers: K of the factors. A model that was cut to its first blocks has fewer linear layers.
        rows: numbers of the layers among the K; empty for 0, 1, ...
    """

    stack: LayerStack
    rank: Rank
    quant_type: QuantType | None
    layers: int
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, report: StackReport) -> "Placement":
        """A stack as it was prepared."""
        return cls(report.stack, report.rank, report.quant_type, report.factor_layers, report.rows)


def build(model: PreTrainedModel, settings: Settings, placements: Sequence[Placement]) -> None:
    """Replace the linear layers of some stacks by empty `AdaptedLinear`s, and add an empty factor
    bank.

    Raises:
        ValueError: if there are no stacks, or a linear layer is missing in the model or has another
            shape.
    """
    if not placements:
        raise ValueError(
            "The checkpoint's quantization_config lists no stacks: config.json is damaged; restore "
            "it."
        )
    for placement in placements:
        for path in placement.stack.modules:
            _check_weight(model, path, placement.stack)
    attach_bank(model)
    method = METHODS[settings.method]
    for index, (stack, rank, quant_type, layers, rows) in enumerate(placements):
        fmt = QuantFormat.of(settings.of_stack(quant_type))
        key = bank_key(index) if rank else None
        if key is not None:
            factors = method(
                layers, stack.out_features, stack.in_features, rank, factor_dtype(settings)
            )
            getattr(model, BANK)[key] = factors
        for place, row in enumerate(rows or range(stack.layers)):
            adapt(model, stack, place, fmt, key, row)
    for module in model.modules():
        if _only_holds_adapted(module):
            # Or transformers would run its code for new weights, which may read shapes (BLT).
            mark_initialized(module)


def _only_holds_adapted(module: nn.Module) -> bool:
    """Whether a module holds adapted linear layers, and no tensors itself."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not own and any(isinstance(child, AdaptedLinear) for child in module.children())


def bank_key(index: int) -> str:
    """Name of the factors of stack number `index`.

    It is not the name of the stack: transformers renames keys on saving and loading, by patterns
    that may match a part of the stack's name.
    """
    return f"stack{index}"


def attach_bank(model: PreTrainedModel) -> None:
    """Add an empty factor bank at the root.

    Its masters stay float32 if the model is loaded in another dtype.
    """
    setattr(model, BANK, FactorBank())
    set_always_float32(model, always_float32(model) | {BANK})


def adapt(
    model: PreTrainedModel,
    stack: LayerStack,
    index: int,
    fmt: QuantFormat | None,
    key: str | None,
    row: int | None = None,
) -> AdaptedLinear:
    """Replace weight number `index` of a stack by an `AdaptedLinear` with the factors `key`, as
    their layer number `row`, by default `index`.

    The new weight is empty, and the bias is the old bias. Experts must come in order: the last
    expert removes the fused parameter.
    """
    weight = read_slice(model, stack, index)
    path, _ = stack.module_and_expert(index)
    owner, _, name = path.rpartition(".")
    old = model.get_submodule(owner if stack.experts else path)
    bias: Tensor | None = None if stack.experts else linear_layer(model, path).bias
    with weight.device:
        layer = AdaptedLinear(
            stack.in_features, stack.out_features, bias is not None, fmt, weight.dtype
        )
    if bias is not None:
        layer.bias = frozen(bias.detach())
    if key is not None:
        bank: FactorBank = getattr(model, BANK)
        bank.names[key] = stack.name
        layer.attach(bank, key, index if row is None else row)
    layer.train(old.training)
    mark_initialized(layer)  # some classes (Funnel) take a weight of a "Linear" for a matrix
    if stack.experts:
        add_expert(old, name, layer)
    else:
        replace_module(model, path, layer)
    return layer


def freeze(model: PreTrainedModel, modules_to_save: Sequence[str]) -> None:
    """Freeze everything but the trainable parameters of the factors and `modules_to_save`.

    Names of modules that the model does not have are ignored. From here on, freezing all layers of
    a stack freezes its factors.
    """
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.follow_freezing()
    for factors in getattr(model, BANK).values():
        factors.frozen_layers.clear()
        for parameter in factors.trained():
            parameter.requires_grad_(True)
    modules = dict(model.named_modules())
    for path in modules_to_save:
        if path in modules:
            modules[path].requires_grad_(True)


def task_head(model: PreTrainedModel) -> list[str]:
    """Names of the top-level modules of a task head.

    They lie outside the base model and are not the output of a language model. If a class does not
    name its base model (`WhisperForAudioClassification`), every child with parameters, but without
    repeated blocks and embeddings, counts as a head.
    """
    output = model.get_output_embeddings()
    children = dict(model.named_children())
    if model.base_model is not model:
        heads = {name for name, child in children.items() if child is not model.base_model}
    elif output is not None or "For" not in type(model).__name__:
        return []
    else:
        heads = {name for name, child in children.items() if not _holds_body(child)}
    heads.discard(BANK)
    return [
        name
        for name, child in children.items()
        if name in heads and output not in list(child.modules()) and list(child.parameters())
    ]


def _holds_body(module: nn.Module) -> bool:
    """Whether a module holds repeated blocks or embeddings."""
    return any(isinstance(child, nn.ModuleList | nn.Embedding) for child in module.modules())


def with_trained_modules(
    model: PreTrainedModel, settings: Settings, stacks: Sequence[LayerStack]
) -> Settings:
    """The settings with the paths of all modules that train in full as `modules_to_save`.

    These are the task head and the modules that the settings name.

    Raises:
        ValueError: if a name matches no module, or a module that is quantized.
    """
    paths = [path for path, _ in model.named_modules() if path]
    names = settings.modules_to_save
    unmatched = [name for name in names if not any(ends_with(path, name) for path in paths)]
    if unmatched:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"modules_to_save {unmatched} match no module; the top-level modules are: {children}"
        )
    named = [path for path in paths if any(ends_with(path, name) for name in names)]
    quantized = [f"{path}." for stack in stacks for path in stack.modules]
    for path in named:
        if any(inner.startswith(f"{path}.") for inner in quantized):
            raise ValueError(
                f"modules_to_save names {path}, which is or holds linear layers that are "
                "quantized; they cannot train in full. Give them factors with target_modules "
                "instead."
            )
    return replace(settings, modules_to_save=tuple(dict.fromkeys(task_head(model) + named)))


def located(model: PreTrainedModel, stack: LayerStack) -> LayerStack:
    """A stack with the paths that its modules have in this model.

    In a model with a head, paths begin with a prefix that they do not have in the base model.
    """
    prefix = f"{model.base_model_prefix}."
    first = stack.modules[0]
    if _has(model, stack, prefix + first):
        longer = tuple(prefix + path for path in stack.modules)
        return replace(stack, name=prefix + stack.name, modules=longer)
    if not _has(model, stack, first):
        shorter = tuple(path.removeprefix(prefix) for path in stack.modules)
        return replace(stack, name=stack.name.removeprefix(prefix), modules=shorter)
    return stack


def _has(model: PreTrainedModel, stack: LayerStack, path: str) -> bool:
    try:
        _stored_shape(model, stack, path)
    except AttributeError:
        return False
    return True


def _stored_shape(model: PreTrainedModel, stack: LayerStack, path: str) -> list[int]:
    """Shape of the weight of a linear layer, or of a fused parameter.

    Raises:
        AttributeError: if the model has none at this path.
    """
    if stack.experts:
        return list(model.get_parameter(path).shape)
    return list(linear_layer(model, path).weight.shape)


def _check_weight(model: PreTrainedModel, path: str, stack: LayerStack) -> None:
    try:
        shape = _stored_shape(model, stack, path)
    except AttributeError:
        raise ValueError(
            f"The checkpoint was prepared on a model that has {path}; {type(model).__name__} has "
            "no such linear layer. Load it with the class that saved it (qrefta.load does), and "
            "without arguments that change the model, such as num_hidden_layers."
        ) from None
    matrix = [stack.out_features, stack.in_features]
    if stack.transposed:
        matrix.reverse()
    wanted = [stack.experts, *matrix] if stack.experts else matrix
    if shape != wanted:
        raise ValueError(
            f"{path} has the shape {shape}, but the checkpoint was prepared with {wanted}."
        )
