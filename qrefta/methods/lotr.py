"""LoTR: a zero update in Tucker-2 form over the layers (arXiv 2402.01376, Bershatsky and others).

From the paper: Delta_l = L G_l R, with L and R shared by all layers of a stack and one G_l a layer,
all trainable. Ours: L and R start random with orthonormal columns and rows, and G_l at 0.
"""

import torch
from torch import Tensor, nn

from qrefta.nn.factors import LowRankFactors


class LoTR(LowRankFactors):
    """Delta_l = L G_l R. A stack trains r (in + out) + K r^2 parameters.

    Args: see `Factors`; `rank` is r, at most min(in, out).
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.L = nn.Parameter(torch.empty(out_features, rank, dtype=self.master_dtype))
        self.R = nn.Parameter(torch.empty(rank, in_features, dtype=self.master_dtype))
        self.G = nn.Parameter(torch.zeros(layers, rank, rank, dtype=self.master_dtype))

    def draw(self, generator: torch.Generator) -> None:
        for columns in (self.L, self.R.T):
            drawn = torch.randn(columns.shape, generator=generator, dtype=torch.float64)
            orthonormal = torch.linalg.qr(drawn).Q
            columns.copy_(orthonormal.to(self.dtype))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    def down(self) -> Tensor:
        return self.R

    def core(self, layer: int) -> Tensor:
        return self.rounded(self.G[layer])

    def up(self) -> Tensor:
        return self.L

    def trained(self) -> list[nn.Parameter]:
        return [self.L, self.R, self.G]
