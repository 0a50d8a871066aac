"""CRAFT: a frozen Tucker decomposition, rotated by three small trained squares (arXiv 2602.17510, Dewage, Pensky,
De Silva, Mondal).

From the paper: Tucker-3 by HOSVD of weights stacked over layers, its factors and core frozen, one small trained square
a mode, the rest of the weight kept. Ours, where its text leaves it open or stops short: the squares are J = I + (the
trained numbers), so that bf16 rounds a change and not a 1; J_out and J_in act on the core; and only the rest of the
weight is in 4 bits.
"""

import torch
from torch import Tensor, nn

from qrefta.linalg.tsvd import Slices
from qrefta.linalg.tucker import hosvd
from qrefta.nn.factors import Fit, LowRankFactors, Rank, frozen


class CRAFT(LowRankFactors):
    """Delta_l = U_out J_out (sum_k (U_layer J_layer)[l, k] G_k) J_in^T U_in^T; only the squares J train.

    A stack of ranks (r_layer, r_out, r_in) trains r_layer^2 + r_out^2 + r_in^2 numbers. All of them are in the core:
    U_out and U_in multiply tokens as they are, and the cores are mixed once a layer and step.

    Args: see `Factors`; `rank` is (r_layer, r_out, r_in), or one number for all three.
    """

    fits = True
    transforms = ("lsm3",)

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        rank = self.rank_of(layers, out_features, in_features, rank)
        super().__init__(layers, out_features, in_features, rank, dtype)
        r_layer, r_out, r_in = rank
        master = torch.promote_types(dtype, torch.float32)
        self.layer_square, self.out_square, self.in_square = (
            nn.Parameter(torch.zeros(size, size, dtype=master)) for size in rank
        )
        self.left = frozen(torch.empty(out_features, r_out, dtype=master))
        self.right = frozen(torch.empty(r_in, in_features, dtype=master))
        self.cores = frozen(torch.empty(r_layer, r_out, r_in, dtype=master))
        # U_layer, float32 as raw bytes: a bf16 conversion of the model must not round it.
        self.mix = frozen(torch.empty(layers, 4 * r_layer, dtype=torch.uint8))

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
        ranks = cls.rank_of(*slices.shape, rank)
        found = hosvd(slices, ranks, seed, None if starts is None else starts[0])
        with slices.device:
            factors = cls(*slices.shape, ranks, dtype)
        with torch.no_grad():
            factors.left.copy_(found.left.to(dtype))
            factors.right.copy_(found.right.to(dtype))
            factors.cores.copy_(found.core.to(dtype))
            mix = torch.empty(len(transform), ranks[0], device=slices.device)
            factors.mix.copy_(mix.copy_(transform[:, : ranks[0]]).view(torch.uint8))
        return Fit(factors, found.core.square().sum().item(), [found.basis])

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return max(layers, out_features, in_features)

    @classmethod
    def rank_of(
        cls, layers: int, out_features: int, in_features: int, rank: Rank
    ) -> tuple[int, int, int]:
        """Three ranks, each at most its mode and the product of the two others, beyond which it adds nothing."""
        asked = [rank] * 3 if isinstance(rank, int) else list(rank)
        if len(asked) != 3 or any(type(one) is not int or one < 1 for one in asked):
            raise ValueError(
                f"ranks is {rank!r}; CRAFT takes three whole numbers, 1 or more: layers, outputs, inputs"
            )
        r_layer, r_out, r_in = (
            min(pair) for pair in zip(asked, (layers, out_features, in_features), strict=True)
        )
        r_out, r_in = min(r_out, r_layer * r_in), min(r_in, r_layer * r_out)
        return min(r_layer, r_out * r_in), r_out, r_in

    def down(self) -> Tensor:
        return self.right

    def core(self, layer: int) -> Tensor:
        weights = self.mix[layer].view(torch.float32).to(self.cores)
        weights = weights + weights @ self._seen(self.layer_square)
        core = torch.tensordot(weights, self.cores, 1)
        core = core + self._seen(self.out_square) @ core
        return core + core @ self._seen(self.in_square).T

    def up(self) -> Tensor:
        return self.left

    def trained(self) -> list[nn.Parameter]:
        return [self.layer_square, self.out_square, self.in_square]
