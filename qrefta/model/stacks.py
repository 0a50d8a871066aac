"""The stacks of a model: linear layers of one role and one shape, in layer order.

A transformers model is a run of repeated blocks. The same linear layer of every block (its module
path without the layer number) makes one stack. The K weights of a stack are the frontal slices of
the third-order tensor that a tensor method decomposes. A fused parameter of a block's experts
gives one slice for each expert. Only repeated blocks are searched: embeddings, norms, lm_head,
poolers and task heads lie outside and stay as they are.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeGuard

from torch import nn
from transformers import Conv1D, PreTrainedModel

from qrefta._compat.accelerate import runs_own_forward
from qrefta._compat.torch import direct_parameters
from qrefta.config.stack import LayerStack
from qrefta.model.names import keeps_scales
from qrefta.model.reads import read_weights
from qrefta.model.weights import PlainLinear
from qrefta.nn.experts import Experts, fused_names, is_experts


def find_stacks(model: nn.Module) -> list[LayerStack]:
    """Stacks of all linear layers and fused experts in the repeated blocks of `model`.

    They come in the order of the model's modules. A number in a module path is a layer number when
    it indexes repeated blocks (see `_is_repeated`). Other numbers are part of the role: T5's
    `encoder.block.*.layer.0.SelfAttention.q` keeps its 0. Left out are

    - subclasses of `nn.Linear`, such as the output projection of `nn.MultiheadAttention`, because
      they may compute something else;
    - linear layers whose weight is read by other code of the model (Mamba's dt_proj, RWKV's
      output), because a packed weight would break that code (see `qrefta.model.reads`);
    - linear layers that share their weight with another module, because they train as one;
    - linear layers whose forward was replaced, or whose weight is no parameter (weight norm);
    - gates with one output (Qwen2-MoE's shared_expert_gate), whose one row has rank 1;
    - linear layers whose scales transformers would lose (see `qrefta.model.names.keeps_scales`);
    - experts that are computed by their model's code (Llama 4) and not by transformers' interface
      (see `is_experts`);
    - everything outside the base model, because task heads may hold lists of linear layers too
      (SegFormer's decode_head).
    """
    members: dict[LayerStack, list[str]] = {}  # module paths, by their stack without modules
    for path, stack in _stacked_weights(model):
        members.setdefault(stack, []).append(path)
    return [
        replace(stack, modules=tuple(paths))
        for stack, paths in members.items()
        if stack.experts or not isinstance(model, PreTrainedModel) or keeps_scales(model, paths[0])
    ]


def _stacked_weights(model: nn.Module) -> Iterator[tuple[str, LayerStack]]:
    """Paths of linear layers and fused parameters, each with its stack, still without modules."""
    left = not_quantizable(model)
    for path, module in body_modules(model):
        role = role_of(model, path)
        if "*" not in role:
            continue
        if is_experts(module):
            for name, stack in _fused_weights(module, role):
                yield f"{path}.{name}", stack
        elif _is_plain(module) and path not in left:
            transposed = type(module) is Conv1D
            yield path, _empty_stack(role, module.weight.shape, transposed)


def body_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the base model with their paths in `model`: all but task heads."""
    base = set(getattr(model, "base_model", model).modules())
    for path, module in model.named_modules():
        if module in base:
            yield path, module


def _fused_weights(experts: Experts, role: str) -> Iterator[tuple[str, LayerStack]]:
    """Names of the fused parameters of a block's experts, each with its stack."""
    for name in fused_names(experts):
        count, *shape = getattr(experts, name).shape
        yield name, _empty_stack(f"{role}.{name}", shape, experts.is_transposed, count)


def _empty_stack(
    role: str, stored: Sequence[int], transposed: bool, experts: int = 0
) -> LayerStack:
    """A stack without modules, by the shape in which its weights are stored."""
    out_features, in_features = reversed(stored) if transposed else stored
    return LayerStack(role, (), out_features, in_features, transposed, experts)


def select_stacks(
    stacks: list[LayerStack], target_modules: str | Sequence[str] | None
) -> list[LayerStack]:
    """The stacks whose modules `target_modules` names (see `qrefta.prepare`).

    Raises:
        ValueError: if there is no stack, if a name or the expression matches no stack (the message
            lists all stacks), or if it matches only some layers of a stack.
    """
    if not stacks:
        raise ValueError(
            "The model has no linear layers in repeated blocks; there is nothing to prepare."
        )
    if target_modules is None:
        return stacks
    if isinstance(target_modules, str):
        return _matching(stacks, target_modules, _compile(target_modules).fullmatch)
    if not target_modules:
        raise _no_match(stacks, list(target_modules))
    chosen = [_matching(stacks, name, partial(ends_with, name=name)) for name in target_modules]
    return [stack for stack in stacks if any(stack in matching for matching in chosen)]


def _matching(
    stacks: list[LayerStack], target: str, matches: Callable[[str], object]
) -> list[LayerStack]:
    """The stacks whose modules all match."""
    chosen = []
    for stack in stacks:
        count = sum(bool(matches(path)) for path in stack.modules)
        if 0 < count < len(stack.modules):
            raise ValueError(
                f"target_modules {target!r} matches {count} of the {len(stack.modules)} layers of "
                f"{stack.name}; factors are shared by all layers of a stack, so name all of them "
                "or none"
            )
        if count:
            chosen.append(stack)
    if not chosen:
        raise _no_match(stacks, target)
    return chosen


def _no_match(stacks: list[LayerStack], target: str | Sequence[str]) -> ValueError:
    available = ", ".join(stack.name for stack in stacks)
    hint = ""
    if target == "all-linear":
        hint = " For all of them, leave target_modules out."
    elif isinstance(target, str) and any(ends_with(stack.name, target) for stack in stacks):
        hint = f" A text is a regular expression for the whole path; give a list: [{target!r}]."
    return ValueError(
        f"target_modules {target!r} matches no linear layer; the stacks are: {available}.{hint}"
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target_modules {pattern!r} is not a regular expression: {error}"
        ) from error


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is a module path or its last parts."""
    return path == name or path.endswith("." + name)


def _is_plain(module: nn.Module) -> TypeGuard[PlainLinear]:
    """Whether a module computes x W^T + bias and nothing else.

    `FalconLinear` computes it in two steps.
    """
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def not_quantizable(model: nn.Module) -> dict[str, str]:
    """Paths of the linear layers whose weights must stay as they are, each with the reason."""
    read = dict.fromkeys(read_weights(model), "other code of the model reads the weight")
    tied = dict.fromkeys(_tied(model), "it shares its weight with another module")
    gates = {
        path: "it has one output"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1
    }
    return gates | read | tied | _altered(model)


def _altered(model: nn.Module) -> dict[str, str]:
    """Paths of the linear layers that were changed after they were made, each with the reason.

    Weight norm, spectral norm and pruning in their older form compute the weight in a hook, from
    parameters of other names.
    """
    altered = {}
    for path, module in model.named_modules():
        if not isinstance(module, PlainLinear):
            continue
        if "weight" not in direct_parameters(module):
            altered[path] = "its weight is computed in each pass, as by weight norm or pruning"
        elif not runs_own_forward(module):
            altered[path] = "its forward was replaced"
    return altered


def _tied(model: nn.Module) -> set[str]:
    """Paths of the modules whose weight another module has too.

    Without storage shared parameters are distinct objects, and only the class tells of them.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = direct_parameters(module).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    told = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {path for paths in owners.values() if len(paths) > 1 for path in paths}
    return tied | {name.removesuffix(".weight") for pair in told.items() for name in pair}


def role_of(model: nn.Module, path: str) -> str:
    """`path` with every index of repeated blocks replaced by `*`."""
    return ".".join("*" if repeated else part for part, repeated in _walk(model, path))


def block_of(model: nn.Module, path: str) -> str:
    """The path of the outermost repeated block that holds the module at `path`; a list of modules
    is no block.

    Raises:
        ValueError: if no repeated block holds it.
    """
    parts = []
    for part, repeated in _walk(model, path):
        parts.append(part)
        path_so_far = ".".join(parts)
        container = isinstance(model.get_submodule(path_so_far), nn.ModuleList | nn.Sequential)
        if repeated and not container:
            return path_so_far
    raise ValueError(f"{path} is in no repeated block of {type(model).__name__}.")


def _walk(model: nn.Module, path: str) -> Iterator[tuple[str, bool]]:
    """The parts of a module path, each with whether it is an index of repeated blocks."""
    parent = model
    for part in path.split("."):
        yield part, part.isdigit() and _is_repeated(parent)
        parent = parent.get_submodule(part)


def _is_repeated(container: nn.Module) -> bool:
    """Whether a container holds repeated blocks: one block, or several of the same class.

    T5 keeps the different sublayers of one block in a `ModuleList`, all of different classes, and
    an MLP written as `nn.Sequential(Linear, GELU, Linear)` holds modules without children: neither
    is repeated. Hybrid models (attention and state-space blocks in one list) are.
    """
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return False
    children = list(container.children())
    if not any(list(child.children()) for child in children):
        return False
    classes = {type(child) for child in children}
    return len(children) == 1 or len(classes) < len(children)
