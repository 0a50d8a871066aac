"""LoRETTA: low-rank updates whose two matrices are tensor trains (Yang et al. 2024, arXiv
2402.11417).

The form LoRETTA_rep of the paper, on unquantized weights: Delta W = up down, where `down`
(bottleneck x in) and `up` (out x bottleneck) are trains of small trainable cores. Choices where the
paper is silent: three modes per side, as even as the divisors allow; Gaussian cores, scaled so that
`down` keeps lengths; the last core of `up` starts at zero.
"""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.peers.baselines import adapted_layers, train_head_only
from qrefta.model.replace import replace_module

BOTTLENECK = 8


class LoRETTALinear(nn.Module):
    """A frozen linear layer and its update.

    Args:
        linear: (out, in); frozen.
        rank: rank between two cores of a train.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = train((BOTTLENECK, *modes(linear.in_features)), rank)
        self.up = train((*modes(linear.out_features), BOTTLENECK), rank)
        with torch.no_grad():
            self.down[0].mul_(matrix(self.down).norm().reciprocal() * BOTTLENECK**0.5)
            self.up[-1].zero_()

    def forward(self, x: Tensor) -> Tensor:
        down = matrix(self.down).view(BOTTLENECK, -1)
        up = matrix(self.up).view(-1, BOTTLENECK)
        return self.linear(x) + (x @ down.T) @ up.T


def loretta(model: PreTrainedModel, rank: int, *, heads: Sequence[str] = ()) -> PreTrainedModel:
    """LoRETTA on every linear layer of the blocks, in place; the head trains too."""
    targets = adapted_layers(model)
    train_head_only(model, heads)
    for path in targets:
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{path} is a {type(linear).__name__}; LoRETTA is implemented for nn.Linear only."
            )
        replace_module(model, path, LoRETTALinear(linear, rank).to(linear.weight.device))
    return model


def modes(features: int) -> tuple[int, int, int]:
    """Three divisors with product `features`, as even as possible."""
    first = max(size for size in range(1, round(features ** (1 / 3)) + 1) if features % size == 0)
    rest = features // first
    second = max(size for size in range(1, isqrt(rest) + 1) if rest % size == 0)
    return tuple(sorted((first, second, rest // second)))


def train(sizes: Sequence[int], rank: int) -> nn.ParameterList:
    """Cores (rank before, size, rank after) of a tensor train, Gaussian; the ranks at both ends are
    1.
    """
    ranks = [1, *[rank] * (len(sizes) - 1), 1]
    return nn.ParameterList(
        torch.randn(before, size, after) / rank**0.5
        for before, size, after in zip(ranks[:-1], sizes, ranks[1:], strict=True)
    )


def matrix(cores: nn.ParameterList) -> Tensor:
    """The tensor of a train, flattened."""
    tensor, *others = cores
    for core in others:
        tensor = torch.tensordot(tensor, core, 1)
    return tensor.flatten()
