"""LoRTA: a zero update in CP form over the layers (arXiv 2410.04060, Hounie and others).

From the paper: the update of all layers is one CP tensor. Ours: one tensor a stack, with modes
layers, outputs and inputs (the paper adds a mode for heads and a mode for the four matrices of
attention). Inputs start random with unit rows, outputs at 0 and layers at 1; the parameters of the
layer mode are deviations from 1.
"""

import torch
from torch import Tensor, nn

from qrefta.nn.factors import LowRankFactors, unit_rows


class LoRTA(LowRankFactors):
    """Delta_l = A diag(1 + c_l) B. A stack trains r (in + out + K) parameters.

    Args: see `Factors`; `rank` is r, at most K min(in, out).
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.A = nn.Parameter(torch.zeros(out_features, rank, dtype=self.master_dtype))
        self.B = nn.Parameter(torch.empty(rank, in_features, dtype=self.master_dtype))
        self.C = nn.Parameter(torch.zeros(layers, rank, dtype=self.master_dtype))

    def draw(self, generator: torch.Generator) -> None:
        self.B.copy_(unit_rows(self.B, generator).to(self.dtype))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return layers * min(out_features, in_features)

    def down(self) -> Tensor:
        return self.B

    def core(self, layer: int) -> Tensor:
        return 1 + self.rounded(self.C[layer])

    def up(self) -> Tensor:
        return self.A

    def trained(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.C]
