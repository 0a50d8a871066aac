"""The weights of a stack, as the linear layers of a model or its experts hold them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from transformers import Conv1D

from qrefta.config.stack import LayerStack

LARGEST_WEIGHT = 1e12
BLOCK_BYTES = 64 << 20

PlainLinear = nn.Linear | Conv1D


def linear_layer(model: nn.Module, path: str) -> PlainLinear:
    """The linear layer at a module path.

    Raises:
        AttributeError: if the model has no linear layer there.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, PlainLinear):
        raise AttributeError(f"{path} is a {type(layer).__name__}, not a linear layer")
    return layer


def read_weight(layer: PlainLinear) -> Tensor:
    """The weight of a linear layer as (out, in), without a copy."""
    weight = layer.weight.detach()
    return weight.T if type(layer) is Conv1D else weight


def read_slice(model: nn.Module, stack: LayerStack, index: int) -> Tensor:
    """Weight number `index` of a stack as (out, in), without a copy."""
    path, expert = stack.module_and_expert(index)
    if not stack.experts:
        return read_weight(linear_layer(model, path))
    weight = model.get_parameter(path).detach()[expert]
    return weight.T if stack.transposed else weight


@dataclass(frozen=True)
class Weights:
    """The weights of a stack, read a few rows at a time from memory or from a file.

    Attributes:
        shape: (layers, out, in).
        read: (layer, first row, row after the last) -> (rows, in), of any floating dtype and on
            any device; the result must not be written to.
        device: where the work is done.
        block_bytes: bytes of one block of rows of all layers in float32; about six blocks exist at
            once. Another size changes results by float32 rounding.
        keep: whether one copy of the stack in float32 may be held between passes.
    """

    shape: tuple[int, int, int]
    read: Callable[[int, int, int], Tensor]
    device: torch.device
    block_bytes: int = BLOCK_BYTES
    keep: bool = True

    @classmethod
    def of(cls, stack: Tensor) -> Self:
        """The weights of a tensor (layers, out, in)."""
        layers, out_features, in_features = stack.shape

        def read(layer: int, start: int, stop: int) -> Tensor:
            return stack[layer, start:stop]

        return cls((layers, out_features, in_features), read, stack.device)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of every layer, (layers, rows, in), float32, a copy."""
        layers, _, in_features = self.shape
        size = (layers, stop - start, in_features)
        block = torch.empty(size, dtype=torch.float32, device=self.device)
        for layer in range(layers):
            block[layer] = self.read(layer, start, stop)
        return block

    def layer(self, index: int) -> Tensor:
        """One weight, (out, in), float32, a copy."""
        _, out_features, in_features = self.shape
        copy = torch.empty(out_features, in_features, dtype=torch.float32, device=self.device)
        return copy.copy_(self.read(index, 0, out_features))


def model_weights(
    model: nn.Module, stack: LayerStack, device: torch.device | None = None
) -> Weights:
    """The weights of a stack of a model in memory.

    No copy of experts is held, since they are most of a model; each pass over them mixes them
    again.

    Args:
        model: dense.
        stack: of the model.
        device: where the work is done; default: the device of the first layer.
    """

    def read(layer: int, start: int, stop: int) -> Tensor:
        return read_slice(model, stack, layer)[start:stop]

    device = device or read_slice(model, stack, 0).device
    return Weights(stack.shape, read, device, BLOCK_BYTES, keep=not stack.experts)


def check_values(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be split.

    Raises:
        ValueError: if its dtype is not float32, bfloat16 or float16, or it holds NaN, infinity, or
            numbers so large that the product of two overflows.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; prepare takes float32, bfloat16 or float16.")
    if weight.numel() == 0:
        return
    extremes = weight.detach().aminmax()
    low = extremes.min.item()
    high = extremes.max.item()
    if math.isnan(low + high) or math.inf in (-low, high):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged.")
    largest = max(-low, high)
    if largest > LARGEST_WEIGHT:
        raise ValueError(
            f"{name} holds numbers up to {largest:.0e}; prepare takes up to {LARGEST_WEIGHT:.0e}, "
            "because products of larger numbers overflow float32. The checkpoint is damaged, or "
            "its weights must be scaled down."
        )
