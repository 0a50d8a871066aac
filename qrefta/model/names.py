"""The matrices of a checkpoint that fill each weight of a model when transformers loads it.

transformers renames the tensors that it reads, and merges some: a checkpoint may hold the experts
of a block as separate matrices, a gate and an up projection each, where the model has one fused
parameter. Its tables of renamings and conversions say which.
"""

import torch
from transformers import PreTrainedModel

from qrefta._compat.transformers import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
)
from qrefta.config.stack import LayerStack
from qrefta.files.safetensors import Checkpoint, Part


def weight_parts(
    model: PreTrainedModel, checkpoint: Checkpoint, stacks: list[LayerStack]
) -> dict[str, list[Part]]:
    """The checkpoint's matrices of every stacked weight, by the path of its adapted layer.

    The rows of the matrices follow one another in the weight.

    Raises:
        ValueError: if a weight is missing in the checkpoint, has another shape there, or is merged
            in a way unknown here.
    """
    tensors = sources(model, checkpoint)
    rows = _row_parts(model, checkpoint, stacks)
    parts: dict[str, list[Part]] = {}
    missing: list[str] = []
    for stack in stacks:
        matrices = []
        for path in stack.modules:
            if path in rows:
                module_parts = [[rows[path]]]
            else:
                module_parts = _module_parts(checkpoint, stack, path, tensors)
            if len(module_parts) != max(stack.experts, 1):
                missing.append(path)
            matrices += module_parts
        parts |= zip(stack.adapted, matrices, strict=False)
    if missing:
        total = sum(len(stack.modules) for stack in stacks)
        raise ValueError(
            f"The checkpoint has no tensor for {len(missing)} of the {total} linear layers, the "
            f"first is {missing[0]}. It is incomplete, or it stores them merged; in that case "
            "load the model and prepare it in memory."
        )
    for stack in stacks:
        for path in stack.adapted:
            _check_shape(checkpoint, stack, parts[path])
    return parts


def _module_parts(
    checkpoint: Checkpoint, stack: LayerStack, path: str, tensors: dict[str, list[list[str]]]
) -> list[list[Part]]:
    """The matrices of a linear layer, or of every expert in a fused parameter."""
    names = tensors.get(path if stack.experts else f"{path}.weight", [])
    if stack.experts and names:
        fused = names[0][0]
        shape = checkpoint.shape(fused)
        if len(shape) == 3:
            return [[Part(fused, expert)] for expert in range(shape[0])]
    return [[Part(name) for name in rows] for rows in names]


def _row_parts(
    model: PreTrainedModel, checkpoint: Checkpoint, stacks: list[LayerStack]
) -> dict[str, Part]:
    """The rows of a checkpoint's matrix for each linear layer that transformers splits from it.

    A matrix counts if all of its rows belong to linear layers of the stacks.
    """
    state = model.state_dict()
    stacked = {path for stack in stacks if not stack.transposed for path in stack.modules}
    renamings, converters = _weight_mapping(model)
    splitting = {
        converter.source_patterns[0]: converter.target_patterns
        for converter in converters
        if _splits_rows(converter)
    }
    parts: dict[str, Part] = {}
    for name in checkpoint.names:
        renamed, pattern = rename_source_key(
            name, renamings, converters, str(model.base_model_prefix), state
        )
        targets = splitting.get(pattern or "", [])
        found: dict[str, Part] = {}
        stop = 0
        for target in targets:
            path = renamed.replace(targets[0], target)
            if path.removesuffix(".weight") not in stacked:
                break
            start, stop = stop, stop + len(state[path])
            found[path.removesuffix(".weight")] = Part(name, rows=(start, stop))
        if targets and len(found) == len(targets) and stop == checkpoint.shape(name)[0]:
            parts |= found
    return parts


def _splits_rows(converter: WeightConverter) -> bool:
    """Whether it splits one matrix into several, whose rows follow one another."""
    steps = [
        (type(operation), getattr(operation, "dim", None)) for operation in converter.operations
    ]
    return (
        steps in ([(Chunk, 0)], [(Split, 0)])
        and len(converter.source_patterns) == 1
        and len(converter.target_patterns) > 1
    )


def _check_shape(checkpoint: Checkpoint, stack: LayerStack, parts: list[Part]) -> None:
    wanted = (stack.out_features, stack.in_features)
    order = -1 if stack.transposed else 1
    shapes = [checkpoint.matrix_shape(part)[::order] for part in parts]
    fits = all(len(shape) == 2 and shape[1] == wanted[1] for shape in shapes)
    if not fits or sum(rows for rows, _ in shapes) != wanted[0]:
        stored = " and ".join(str(list(checkpoint.shape(part.name))) for part in parts)
        raise ValueError(
            f"{parts[0].name} has the shape {stored} in the checkpoint and {list(wanted)} by its "
            "config.json."
        )


def sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[list[str]]]:
    """Parameter or buffer of a model -> the tensors of a checkpoint that transformers uses for it.

    transformers renames keys as it loads: old names of an architecture, and the base model's prefix
    that only one of the two may have. A fused parameter may be made of matrices of its experts:
    then there is a list for each expert, in order, with the tensors whose rows follow one another.
    Otherwise there is one name. Parameters that transformers makes of several tensors in other ways
    are left out.
    """
    state = model.state_dict()
    renamings, converters = _weight_mapping(model)
    filled: dict[str, list[list[str]]] = {}
    merged: dict[str, dict[str, list[str]]] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        for renames, converts in ((renamings, converters), ([], [])):
            renamed, pattern = rename_source_key(
                name, renames, converts, str(model.base_model_prefix), state
            )
            if renamed in state:
                if pattern is None:
                    filled[renamed] = [[name]]
                else:
                    merged.setdefault(renamed, {}).setdefault(pattern, []).append(name)
                break
    for parameter, names in merged.items():
        converter = next(
            converter for converter in converters if names.keys() <= set(converter.source_patterns)
        )
        if _fuses_experts(converter):
            matrices = [names.get(pattern, []) for pattern in converter.source_patterns]
            # a missing matrix shows in the number of experts
            filled[parameter] = [list(rows) for rows in zip(*matrices, strict=False)]
    return filled


def stored_together(model: PreTrainedModel) -> dict[str, list[str]]:
    """Tensor of a model -> all tensors that a checkpoint stores as one with it, itself included.

    Some published checkpoints hold query, key and value as one matrix where the model has three.
    Tensors that are stored alone are left out.
    """
    names = model.state_dict().keys()
    _, converters = _weight_mapping(model)
    together: dict[str, list[str]] = {}
    for converter in converters:
        patterns = converter.target_patterns
        for name in names:
            found = next((pattern for pattern in patterns if pattern in name), None)
            if len(patterns) > 1 and found is not None:
                members = [name.replace(found, pattern) for pattern in patterns]
                together[name] = [member for member in members if member in names]
    return together


def keeps_scales(model: PreTrainedModel, path: str) -> bool:
    """Whether transformers finds the scales of a packed linear layer again that it saved.

    It renames tensors as it saves and loads, by patterns that may fit the weight alone (Inkling's
    `weight_proj`, which its checkpoints hold without `.weight`).
    """
    name = f"{path}.absmax"
    (saved,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    renamings, converters = _weight_mapping(model)
    state = dict.fromkeys([*model.state_dict(), name], True)
    for renames, converts in ((renamings, converters), ([], [])):
        renamed, pattern = rename_source_key(
            saved, renames, converts, str(model.base_model_prefix), state
        )
        if renamed == name or pattern is not None:
            return True
    return False


def _fuses_experts(converter: WeightConverter) -> bool:
    """Whether it stacks the matrices of all experts, or several of each below one another."""
    steps = [
        (type(operation), getattr(operation, "dim", None)) for operation in converter.operations
    ]
    stacked: list[tuple[type, int | None]] = [(MergeModulelist, 0)]
    if len(converter.source_patterns) > 1:
        stacked.append((Concatenate, 1))
    return steps == stacked


def _weight_mapping(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """The renamings and conversions of transformers for a model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return renamings, converters
