"""Weights of a model -> the matrices of a checkpoint that they are made of, as transformers would
load them.

transformers renames what it reads, and merges: a checkpoint may hold the experts of a block as
matrices of their own, a gate and an up projection each, where the model has one fused parameter.
Which it does is read from its own tables.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qrefta.files.safetensors import Checkpoint, Part
from qrefta.model.stacks import LayerStack


def weight_parts(
    model: PreTrainedModel, checkpoint: Checkpoint, stacks: list[LayerStack]
) -> dict[str, list[Part]]:
    """The checkpoint's matrices of every stacked weight, below one another, by the path of its
    adapted linear.

    Raises:
        ValueError: if the checkpoint lacks a weight, has it in another shape, or merges it in a way
            unknown here.
    """
    found = sources(model, checkpoint)
    parts: dict[str, list[Part]] = {}
    paths = [path for stack in stacks for path in stack.modules]
    missing = []
    for stack in stacks:
        matrices = []
        for path in stack.modules:
            tensors = found.get(path if stack.experts else f"{path}.weight", [])
            own = [[Part(name) for name in names] for names in tensors]
            if stack.experts and own and len(shape := checkpoint.shape(tensors[0][0])) == 3:
                own = [[Part(tensors[0][0], expert)] for expert in range(shape[0])]
            if len(own) != max(stack.experts, 1):
                missing.append(path)
            matrices += own
        parts |= zip(stack.adapted, matrices, strict=False)
    if missing:
        raise ValueError(
            f"The checkpoint has no tensor for {len(missing)} of the {len(paths)} linears, the "
            f"first is {missing[0]}; it is incomplete, or stores them merged: then load the model "
            "and prepare it in memory."
        )
    for stack in stacks:
        for path in stack.adapted:
            _check_shape(checkpoint, stack, parts[path])
    return parts


def _check_shape(checkpoint: Checkpoint, stack: LayerStack, parts: list[Part]) -> None:
    wanted = (stack.out_features, stack.in_features)
    shapes = [checkpoint.matrix_shape(part)[:: -1 if stack.transposed else 1] for part in parts]
    fits = all(len(shape) == 2 and shape[1] == wanted[1] for shape in shapes)
    if not fits or sum(rows for rows, _ in shapes) != wanted[0]:
        stored = " and ".join(str(list(checkpoint.shape(part.name))) for part in parts)
        raise ValueError(
            f"{parts[0].name} has the shape {stored} in the checkpoint and {list(wanted)} by its "
            "config.json."
        )


def sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, list[list[str]]]:
    """Parameter or buffer of a model -> the tensors of a checkpoint that transformers fills it
    with.

    transformers renames keys as it loads: old names of an architecture, and the base model's prefix
    that one of the two may lack. A fused parameter may be made of matrices of its experts: then
    there is a list for each expert, in order, with the tensors whose rows follow one another.
    Otherwise there is one name. Parameters that transformers makes of several tensors in other ways
    are left out.
    """
    state = model.state_dict()
    renamings, converters = _weight_mapping(model)
    found: dict[str, list[list[str]]] = {}
    merged: dict[str, dict[str, list[str]]] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        for renames, converts in ((renamings, converters), ([], [])):
            renamed, pattern = rename_source_key(
                name, renames, converts, model.base_model_prefix, state
            )
            if renamed in state:
                if pattern is None:
                    found[renamed] = [[name]]
                else:
                    merged.setdefault(renamed, {}).setdefault(pattern, []).append(name)
                break
    for parameter, names in merged.items():
        converter = next(
            converter for converter in converters if names.keys() <= set(converter.source_patterns)
        )
        if _fuses_experts(converter):
            matrices = [names.get(pattern, []) for pattern in converter.source_patterns]
            found[parameter] = [
                list(rows) for rows in zip(*matrices, strict=False)
            ]  # what lacks is told by the count
    return found


def _fuses_experts(converter: WeightConverter) -> bool:
    """Whether it stacks the matrices of all experts, or several of each below one another."""
    steps = [
        (type(operation), getattr(operation, "dim", None)) for operation in converter.operations
    ]
    stacked = [(MergeModulelist, 0)]
    return steps == (
        stacked if len(converter.source_patterns) == 1 else [*stacked, (Concatenate, 1)]
    )


def _weight_mapping(model: nn.Module) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Transformers' own renamings and conversions for a model."""
    mapping = get_model_conversion_mapping(model)
    return [m for m in mapping if isinstance(m, WeightRenaming)], [
        m for m in mapping if isinstance(m, WeightConverter)
    ]
