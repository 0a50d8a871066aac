"""CRAFT: a frozen Tucker decomposition, rotated by three small trainable square matrices.

arXiv 2602.17510, Dewage, Pensky, De Silva, Mondal.

From the paper: Tucker-3 by HOSVD of weights stacked over layers, with frozen factors and core, one
small trainable square matrix a mode, and the rest of the weight kept. Ours, where the text leaves
it open: the squares are J = I + (the trainable parameters), so that bf16 rounds a change and not a
1; J_out and J_in act on the core; and only the rest of the weight is in 4 bits.
"""

import torch
from torch import Tensor, nn

from qrefta.config.rank import Rank
from qrefta.linalg.slices import Slices
from qrefta.linalg.tucker import Tucker, hosvd
from qrefta.nn.factors import Fit, LowRankFactors, frozen
from qrefta.nn.packed import plain_bytes


class CRAFT(LowRankFactors):
    """Delta_l = U_out J_out (sum_k (U_layer J_layer)[l, k] G_k) J_in^T U_in^T; only the J train.

    A stack of ranks (r_layer, r_out, r_in) trains r_layer^2 + r_out^2 + r_in^2 parameters, all of
    them in the core: U_out and U_in multiply tokens as they are, and the cores are mixed once a
    layer and step.

    Args: see `Factors`; `rank` is (r_layer, r_out, r_in), or one number for all three.
    """

    fits = True
    transforms = ("lsm3",)

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        ranks = self.rank_of(layers, out_features, in_features, rank)
        super().__init__(layers, out_features, in_features, ranks, dtype)
        r_layer, r_out, r_in = ranks
        self.layer_square = nn.Parameter(torch.zeros(r_layer, r_layer, dtype=self.master_dtype))
        self.out_square = nn.Parameter(torch.zeros(r_out, r_out, dtype=self.master_dtype))
        self.in_square = nn.Parameter(torch.zeros(r_in, r_in, dtype=self.master_dtype))
        self.left = frozen(torch.empty(out_features, r_out, dtype=self.master_dtype))
        self.right = frozen(torch.empty(r_in, in_features, dtype=self.master_dtype))
        self.cores = frozen(torch.empty(r_layer, r_out, r_in, dtype=self.master_dtype))
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
        start = None if starts is None else starts[0]
        tucker = hosvd(slices, ranks, seed, start)
        with slices.device:
            factors = cls(*slices.shape, ranks, dtype)
        factors._fill(tucker, transform[:, : ranks[0]])
        energy = tucker.core.square().sum().item()
        return Fit(factors, energy, [tucker.basis])

    @torch.no_grad()
    def _fill(self, tucker: Tucker, mix: Tensor) -> None:
        """Take over a decomposition, and the columns of the transform that belong to its cores."""
        self.left.copy_(tucker.left.to(self.dtype))
        self.right.copy_(tucker.right.to(self.dtype))
        self.cores.copy_(tucker.core.to(self.dtype))
        # `view` needs rows without gaps.
        rows = torch.empty(mix.shape, dtype=torch.float32, device=self.mix.device)
        rows.copy_(mix)
        self.mix.copy_(rows.view(torch.uint8))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return max(layers, out_features, in_features)

    @classmethod
    def rank_of(
        cls, layers: int, out_features: int, in_features: int, rank: Rank
    ) -> tuple[int, int, int]:
        """Three ranks, each at most the size of its mode and the product of the two other ranks.

        A larger rank would add nothing.
        """
        asked = [rank] * 3 if isinstance(rank, int) else list(rank)
        if len(asked) != 3 or any(type(size) is not int or size < 1 for size in asked):
            raise ValueError(
                f"rank is {rank!r}; CRAFT takes one whole number, or three for layers, outputs and "
                "inputs, each 1 or more"
            )
        r_layer = min(asked[0], layers)
        r_out = min(asked[1], out_features)
        r_in = min(asked[2], in_features)
        bounded_out = min(r_out, r_layer * r_in)
        bounded_in = min(r_in, r_layer * r_out)
        bounded_layer = min(r_layer, bounded_out * bounded_in)
        return bounded_layer, bounded_out, bounded_in

    def down(self) -> Tensor:
        return self.right

    def core(self, layer: int) -> Tensor:
        weights = plain_bytes(self.mix)[layer].view(torch.float32).to(self.cores)
        weights = weights + weights @ self.rounded(self.layer_square)
        core = torch.tensordot(weights, self.cores, 1)
        core = core + self.rounded(self.out_square) @ core
        return core + core @ self.rounded(self.in_square).T

    def up(self) -> Tensor:
        return self.left

    def trained(self) -> list[nn.Parameter]:
        return [self.layer_square, self.out_square, self.in_square]
