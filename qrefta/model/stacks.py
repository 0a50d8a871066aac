"""Model -> stacks: the linear layers of one role and one shape, in layer order.

A transformers model is a run of repeated blocks. The same linear of every block (its module path without the layer
number) makes one stack; the K weights of a stack are the frontal slices of the third-order tensor that a tensor
method decomposes. A fused parameter of a block's experts is as many slices as there are experts. Only what lies inside
repeated blocks is found: embeddings, norms, lm_head, poolers and task heads lie outside and are left alone.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from transformers import Conv1D

from qrefta._compat.torch import direct_children
from qrefta.config import LayerStack
from qrefta.nn.experts import fused_names, is_experts

LARGEST_WEIGHT = 1e12
BLOCK_BYTES = 64 << 20


def find_stacks(model: nn.Module) -> list[LayerStack]:
    """Stacks of all linears and fused experts in the repeated blocks of `model`, in the order of its modules.

    A number in a module path is a layer number when it indexes repeated blocks (see `_is_repeated`); other numbers
    are part of the role: T5's `encoder.block.*.layer.0.SelfAttention.q` keeps its 0. Left out are

    - subclasses of `nn.Linear`, such as the output projection of `nn.MultiheadAttention`: they may compute otherwise;
    - linears whose weight their parent reads itself (Mamba's dt_proj), which a packed weight would break;
    - experts whose code is their model's own (Llama 4), and not transformers' interface (see `is_experts`);
    - all outside the base model: task heads may hold lists of linears too (SegFormer's decode_head).
    """
    base = set(getattr(model, "base_model", model).modules())
    sources: dict[type, str] = {}
    members: dict[tuple[str, int, int, bool, int], list[str]] = {}

    def add(role: str, path: str, stored: torch.Size, transposed: bool, experts: int = 0) -> None:
        out_features, in_features = stored[::-1] if transposed else stored
        members.setdefault((role, out_features, in_features, transposed, experts), []).append(path)

    for path, module in model.named_modules():
        fused = is_experts(module)
        if (
            not (fused or _is_plain(module))
            or module not in base
            or "*" not in (role := _role(model, path))
        ):
            continue
        if fused:
            for name in fused_names(module):
                experts, *shape = getattr(module, name).shape
                add(
                    f"{role}.{name}",
                    f"{path}.{name}",
                    torch.Size(shape),
                    module.is_transposed,
                    experts,
                )
        elif not _is_read(model, path, sources):
            add(role, path, module.weight.shape, type(module) is Conv1D)
    return [LayerStack(role, tuple(paths), *kind) for (role, *kind), paths in members.items()]


def select_stacks(
    stacks: list[LayerStack], target_modules: str | Sequence[str] | None
) -> list[LayerStack]:
    """Stacks whose modules `target_modules` names (see `qrefta.prepare`).

    Raises:
        ValueError: if there is no stack, a name or the expression matches none (lists what there is), or it matches
            some layers of a stack only.
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
    return [stack for stack in stacks if any(stack in found for found in chosen)]


def _matching(
    stacks: list[LayerStack], target: str, matches: Callable[[str], object]
) -> list[LayerStack]:
    """Stacks all of whose modules match."""
    chosen = []
    for stack in stacks:
        count = sum(bool(matches(path)) for path in stack.modules)
        if 0 < count < len(stack.modules):
            raise ValueError(
                f"target_modules {target!r} matches {count} of the {len(stack.modules)} layers of {stack.name}; "
                "factors are shared by all layers of a stack, so name all of them or none"
            )
        if count:
            chosen.append(stack)
    if not chosen:
        raise _no_match(stacks, target)
    return chosen


def _no_match(stacks: list[LayerStack], target: str | Sequence[str]) -> ValueError:
    available = ", ".join(stack.name for stack in stacks)
    return ValueError(f"target_modules {target!r} matches no linear; the stacks are: {available}")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target_modules {pattern!r} is not a regular expression: {error}"
        ) from error


def read_weight(module: nn.Module) -> Tensor:
    """Weight of a linear as (out, in), without a copy."""
    return module.weight.detach().T if type(module) is Conv1D else module.weight.detach()


def read_slice(model: nn.Module, stack: LayerStack, index: int) -> Tensor:
    """Weight number `index` of a stack as (out, in), without a copy."""
    path, expert = stack.place(index)
    if not stack.experts:
        return read_weight(model.get_submodule(path))
    weight = model.get_parameter(path).detach()[expert]
    return weight.T if stack.transposed else weight


@dataclass(frozen=True)
class Weights:
    """The weights of a stack, wherever they lie, read a few rows at a time.

    Attributes:
        shape: (layers, out, in).
        read: (layer, first row, row after the last) -> (rows, in), any floating dtype, any device; not to be written.
        device: where the work is done.
        block_bytes: of one block of rows of all layers in float32; about six such exist at once. Another size changes
            results by float32 rounding.
        keep: whether one copy of the stack in float32 may be held between passes.
    """

    shape: tuple[int, int, int]
    read: Callable[[int, int, int], Tensor]
    device: torch.device
    block_bytes: int = BLOCK_BYTES
    keep: bool = True

    @classmethod
    def of(cls, stack: Tensor) -> Self:
        """Those of a tensor (layers, out, in)."""
        return cls(
            tuple(stack.shape), lambda layer, start, stop: stack[layer, start:stop], stack.device
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of every layer, (layers, rows, in), float32, a copy."""
        layers, _, in_features = self.shape
        block = torch.empty(layers, stop - start, in_features, device=self.device)
        for layer in range(layers):
            block[layer] = self.read(layer, start, stop)
        return block

    def layer(self, index: int) -> Tensor:
        """One weight, (out, in), float32, a copy."""
        return torch.empty(self.shape[1:], device=self.device).copy_(
            self.read(index, 0, self.shape[1])
        )


def check_values(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be split.

    Raises:
        ValueError: if its dtype is not float32, bfloat16 or float16, or it holds NaN, infinity or what is so large that
            products of two overflow.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; prepare takes float32, bfloat16 or float16.")
    if weight.numel() == 0:
        return
    low, high = (value.item() for value in weight.detach().aminmax())
    if math.isnan(low + high) or math.inf in (-low, high):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged.")
    if max(-low, high) > LARGEST_WEIGHT:
        raise ValueError(
            f"{name} holds numbers up to {max(-low, high):.0e}; prepare takes up to {LARGEST_WEIGHT:.0e}, as products "
            "of larger ones overflow float32. The checkpoint is damaged, or to be scaled."
        )


def model_weights(
    model: nn.Module, stack: LayerStack, device: torch.device | None = None
) -> Weights:
    """The weights of a stack of a model in memory; worked on at `device`, by default where the first layer is.

    No copy is held of experts, which are most of a model: a pass over them mixes them anew.
    """

    def read(layer: int, start: int, stop: int) -> Tensor:
        return read_slice(model, stack, layer)[start:stop]

    device = device or read_slice(model, stack, 0).device
    return Weights(stack.shape, read, device, BLOCK_BYTES, keep=not stack.experts)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` wherever `model` holds the module at `path` (a shared module has several owners)."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(direct_children(parent)):
            if child is old:
                setattr(parent, name, new)


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is a module path or its last parts."""
    return path == name or path.endswith("." + name)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes x W^T + bias and no more. `FalconLinear` does, in two steps."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def _is_read(model: nn.Module, path: str, sources: dict[type, str]) -> bool:
    """Whether the code of a linear's parent uses its weight other than by calling the linear.

    Reading the device is harmless, and code that names `torch.int8` (T5's feed-forward) expects packed weights.
    `sources` keeps what was read of every class.
    """
    parent, _, name = path.rpartition(".")
    parent_class = type(model.get_submodule(parent))
    if parent_class not in sources:
        sources[parent_class] = _source(parent_class)
    source = sources[parent_class]
    return (
        "torch.int8" not in source
        and re.search(rf"self\.{name}\.weight\b(?!\.device)", source) is not None
    )


def _source(module_class: type) -> str:
    """Source of the methods of a class and its bases; those without source (made at run time) are passed over.

    Method by method: `inspect.getsource` of a class parses its whole file.
    """
    bases = [base for base in module_class.__mro__ if base not in (nn.Module, object)]
    methods = [
        method for base in bases for method in vars(base).values() if inspect.isfunction(method)
    ]
    found = []
    for method in methods:
        with suppress(OSError):
            found.append(inspect.getsource(method))
    return "".join(found)


def _role(model: nn.Module, path: str) -> str:
    """`path` with every index of repeated blocks replaced by `*`."""
    return ".".join("*" if repeated else part for part, repeated in _walk(model, path))


def _walk(model: nn.Module, path: str) -> Iterator[tuple[str, bool]]:
    """Parts of a module path, each with whether it is an index of repeated blocks."""
    parent = model
    for part in path.split("."):
        yield part, part.isdigit() and _is_repeated(parent)
        parent = parent.get_submodule(part)


def _is_repeated(container: nn.Module) -> bool:
    """Whether a container holds repeated blocks: one block, or some class more than once.

    T5 keeps the different sublayers of one block in a `ModuleList` (all of different classes), and an MLP written as
    `nn.Sequential(Linear, GELU, Linear)` holds leaves: neither is repeated. Hybrid models (attention and state-space
    blocks in one list) are.
    """
    children = list(container.children())
    if not isinstance(container, nn.ModuleList | nn.Sequential) or not any(
        list(child.children()) for child in children
    ):
        return False
    classes = {type(child) for child in children}
    return len(children) == 1 or len(classes) < len(children)
