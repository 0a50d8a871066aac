"""ReFTA: tensor singular vectors as trainable factors.

CVPR 2026, Zheng, Tang, Mao, Lin, Cao, pp. 26369-26378.
"""

import torch
from torch import Tensor, nn

from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import TSVD, t_svd
from qrefta.nn.factors import Fit, LowRankFactors, frozen
from qrefta.nn.packed import plain_bytes


class ReFTA(LowRankFactors):
    """Delta_l = A diag(u_l) B. A and B are shared by all layers and train, u_l is frozen.

    Component c is the c-th largest tensor singular value of the stack, from transformed slice k(c).
    A[:, c] and B[c] are its left and right singular vectors, each times the root of the value, and
    u_l[c] = U[l, k(c)]. One stack trains R (in + out) parameters, whatever its depth.

    Args: see `Factors`; `rank` is R, at most K min(in, out).
    """

    fits = True

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.A = nn.Parameter(torch.empty(out_features, rank, dtype=self.master_dtype))
        self.B = nn.Parameter(torch.empty(rank, in_features, dtype=self.master_dtype))
        # u_l, float32 as raw bytes: a bf16 conversion of the model must not round it.
        self.mix = frozen(torch.empty(layers, 4 * rank, dtype=torch.uint8))

    @classmethod
    def fit(
        cls,
        slices: Slices,
        rank: int,
        transform: Tensor,
        dtype: torch.dtype,
        seed: int,
        starts: list[Tensor] | None = None,
    ) -> Fit:
        components, starts = t_svd(slices, rank, seed, starts)
        with slices.device:
            factors = cls(*slices.shape, rank, dtype)
        factors._fill(components, transform)
        energy = components.values.square().sum().item()
        return Fit(factors, energy, starts)

    @torch.no_grad()
    def _fill(self, components: TSVD, transform: Tensor) -> None:
        """Take over the components of a decomposition under a transform, (layers, slices)."""
        roots = components.values.sqrt()
        up = components.left * roots
        down = components.right * roots.unsqueeze(1)
        self.A.copy_(up.to(self.dtype))
        self.B.copy_(down.to(self.dtype))
        mix = transform.to(self.mix.device)[:, components.slices]
        mix = mix.to(torch.float32).contiguous()
        self.mix.copy_(mix.view(torch.uint8))
        counts = torch.bincount(components.slices, minlength=transform.shape[1])
        self.slice_ranks = counts.tolist()

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return layers * min(out_features, in_features)

    def down(self) -> Tensor:
        return self.B

    def core(self, layer: int) -> Tensor:
        return plain_bytes(self.mix)[layer].view(torch.float32)

    def up(self) -> Tensor:
        return self.A

    def trained(self) -> list[nn.Parameter]:
        return [self.A, self.B]
