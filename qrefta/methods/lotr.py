"""LoTR: a zero update in Tucker-2 form over the layers (arXiv 2402.01376, Bershatsky and others).

From the paper: Delta_l = L G_l R, with L and R shared by all layers of a stack and G_l each layer's own, all trained.
Ours: L and R start random with orthonormal columns and rows, and G_l at 0.
"""

import torch
from torch import Tensor, nn

from qrefta.factors import Fit, LowRankFactors, Rank
from qrefta.tensor import Slices


class LoTR(LowRankFactors):
    """Delta_l = L G_l R. A stack trains r (in + out) + K r^2 numbers.

    Args: see `Factors`; `rank` is r, at most min(in, out).
    """

    fits = False

    def __init__(self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        master = torch.promote_types(dtype, torch.float32)
        self.L = nn.Parameter(torch.empty(out_features, rank, dtype=master))
        self.R = nn.Parameter(torch.empty(rank, in_features, dtype=master))
        self.G = nn.Parameter(torch.zeros(layers, rank, rank, dtype=master))

    @classmethod
    def fit(
        cls,
        slices: Slices,
        rank: Rank,
        transform: Tensor,
        dtype: torch.dtype,
        seed: int,
        starts: list[Tensor] | None = None,
    ) -> Fit:
        with slices.device:
            factors = cls(*slices.shape, rank, dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for columns in (factors.L, factors.R.T):
                drawn = torch.randn(columns.shape, generator=generator, dtype=torch.float64)
                columns.copy_(torch.linalg.qr(drawn).Q.to(dtype))
        return Fit(factors, 0.0, [])

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    def down(self) -> Tensor:
        return self.R

    def core(self, layer: int) -> Tensor:
        return self._seen(self.G[layer])

    def up(self) -> Tensor:
        return self.L

    def trained(self) -> list[nn.Parameter]:
        return [self.L, self.R, self.G]
