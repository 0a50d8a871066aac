"""Windows: a zero update whose low-rank components are shared by neighbouring layers. Ours.

LoRA (arXiv 2106.09685) gives every layer a pair of factors, LoRTA (arXiv 2410.04060) gives all
layers of a stack one pair. Here every layer has a window on one pair, and the window moves from
layer to layer. So R sets how far components are shared, at a fixed rank and cost of a layer.

The default, because it scores best after training (`eval/rows/accuracy.jsonl`, five seeds): on
SmolLM2-135M, 30 layers, R = 60 has a perplexity of 47.1 on Shakespeare's plays, QLoRA r = 2 with as
many trainable parameters 49.1, and QLoRA r = 8 47.7.
"""

import math

import torch
from torch import Tensor, nn

from qrefta.nn.factors import LowRankFactors, unit_rows

WIDTH = 8  # components of a layer, as in the usual LoRA


class Windows(LowRankFactors):
    """Delta_l = A[:, I_l] B[I_l], for a window I_l of w components.

    Windows move evenly from the first w components to the last. R = w shares all components in all
    layers, R = K w none, which is LoRA of rank w. A layer has w = 8 components; R if that is less,
    and R / K if that is more. B starts with random rows of length one, A at 0. A stack trains
    R (in + out) parameters, and a layer costs as much as LoRA of rank w.

    Args: see `Factors`; `rank` is R, at most K min(in, out).

    Attributes:
        width: w.
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.width = max(min(WIDTH, rank), math.ceil(rank / layers))
        self.A = nn.Parameter(torch.zeros(out_features, rank, dtype=self.master_dtype))
        self.B = nn.Parameter(torch.empty(rank, in_features, dtype=self.master_dtype))

    def draw(self, generator: torch.Generator) -> None:
        self.B.copy_(unit_rows(self.B, generator).to(self.dtype))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return layers * min(out_features, in_features)

    def window(self, layer: int) -> slice:
        """The components of a layer."""
        first = layer * (self.A.shape[1] - self.width) // max(self.layers - 1, 1)
        return slice(first, first + self.width)

    def served(self, layer: int, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        first = self.window(layer).start
        return up.narrow(1, first, self.width), down.narrow(0, first, self.width)

    def down(self) -> Tensor:
        return self.B

    def up(self) -> Tensor:
        return self.A

    def trained(self) -> list[nn.Parameter]:
        return [self.A, self.B]
