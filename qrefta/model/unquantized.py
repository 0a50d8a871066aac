"""Weights in the blocks of a model that stay in 16 bits, and the reasons."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import Conv1D

from qrefta.config.stack import LayerStack
from qrefta.model.stacks import body_modules, not_quantizable, role_of

WARNED_SHARE = 0.05
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
LISTED = 12  # roles in the warning


@dataclass(frozen=True)
class Unquantized:
    """Weights of one role in the blocks of a model that stay in 16 bits.

    Attributes:
        role: module path with `*` for the layer number.
        weights: their number, over all layers.
        reason: a few words.
    """

    role: str
    weights: int
    reason: str


@dataclass(frozen=True)
class UnquantizedReport:
    """The weights in the blocks of a model that stay in 16 bits.

    Attributes:
        layers: one entry a role, the largest first.
        share: of the weights of all linear layers and experts in the blocks.
    """

    layers: list[Unquantized]
    share: float

    def __str__(self) -> str:
        lines = [f"{self.share:.1%} of the weights in the model's blocks stay in 16 bits:"]
        lines += [
            f"  {layer.role}, {layer.weights:,} weights: {layer.reason}"
            for layer in self.layers[:LISTED]
        ]
        if len(self.layers) > LISTED:
            lines.append(f"  and {len(self.layers) - LISTED} more")
        return "\n".join(lines)


def unquantized(model: nn.Module, stacks: Sequence[LayerStack]) -> UnquantizedReport:
    """The linear layers and fused experts in the blocks of a dense model that no stack holds.

    Blocks are the entries of lists of modules in the base model. Embeddings, task heads and linear
    layers outside of blocks do not count.

    Args:
        model: dense.
        stacks: of the model, see `qrefta.model.stacks.find_stacks`.
    """
    packed = {path for stack in stacks for path in stack.modules}
    total = 0
    kept: Counter[tuple[str, str]] = Counter()
    for weight in _block_weights(model):
        total += weight.count
        if weight.path not in packed:
            kept[weight.role, weight.reason] += weight.count
    layers = [Unquantized(role, count, reason) for (role, reason), count in kept.items()]
    layers.sort(key=lambda layer: -layer.weights)
    share = sum(kept.values()) / total if total else 0.0
    return UnquantizedReport(layers, share)


def warn_of_unquantized(model: nn.Module, stacks: Sequence[LayerStack]) -> None:
    """Warn if more than `WARNED_SHARE` of the weights in the blocks stay in 16 bits."""
    kept = unquantized(model, stacks)
    if kept.share > WARNED_SHARE:
        warnings.warn(str(kept), stacklevel=3)


class _Weight(NamedTuple):
    """A weight in a block.

    Attributes:
        path: of a linear layer the module's, of experts the parameter's, as in a stack.
        role: the path with `*` for the layer number.
        count: of numbers.
        reason: for which it would stay in 16 bits.
    """

    path: str
    role: str
    count: int
    reason: str


def _block_weights(model: nn.Module) -> Iterator[_Weight]:
    """The weights of the linear layers and fused experts in blocks."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left = not_quantizable(model)
    for path, module in body_modules(model):
        if not any(part.isdigit() for part in path.split(".")) or module is output:
            continue
        role = role_of(model, path)
        if isinstance(module, nn.Linear | Conv1D):
            reason = _reason(module, role, left.get(path))
            yield _Weight(path, role, module.weight.numel(), reason)
        elif not isinstance(module, _CONVOLUTIONS):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    reason = f"{type(module).__name__} computes it with code of its model"
                    yield _Weight(f"{path}.{name}", f"{role}.{name}", parameter.numel(), reason)


def _reason(module: nn.Module, role: str, left: str | None) -> str:
    """The reason for which a linear layer would stay in 16 bits.

    Args:
        module: the linear layer.
        role: its path with `*` for the layer number.
        left: the reason for which its weight must stay as it is, if there is one.
    """
    if "*" not in role:
        return "its block has no second of its kind"
    if type(module) not in (nn.Linear, Conv1D):
        return f"a {type(module).__name__} may compute more than a linear layer"
    return left or "transformers renames it in checkpoints in a way that loses its scales"
