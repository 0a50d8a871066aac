"""Forms of the trainable factors that were tried as the default, for the training studies.

All have the shape of ReFTA and LoRTA, Delta_l = A diag(m_l) B, with A and B shared by the layers of
a stack. They differ in the start of A, B and the mix m_l, in what trains, and at which rate. A
factor g w with a fixed number g and a trainable w trains at g times the rate of the others under
Adam, from any optimizer.

    lorta-signs     from zero, like LoRTA; the mix starts at random signs instead of ones
    lorta-slow      LoRTA whose B trains at a tenth of the rate (as LoRA+, arXiv 2402.12354, has it)
    refta-mix       ReFTA whose mix trains too
    refta-unit      the same, with rows of B of length one and all of the singular values in A
    refta-half      half of the components frozen as ReFTA starts them, half from zero as in LoRTA
"""

import torch
from torch import Tensor, nn

from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import TSVD, t_svd
from qrefta.nn.factors import Factors, Fit, LowRankFactors, frozen, unit_rows

SLOW = 0.1


class _Mixed(LowRankFactors):
    """Delta_l = A diag(m_l + c_l) B. A stack trains R (in + out + K) parameters: A, B and c.

    Attributes:
        down_rate: rate of B relative to A.
    """

    down_rate = 1.0

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.A = nn.Parameter(torch.zeros(out_features, rank, dtype=self.master_dtype))
        self.B = nn.Parameter(torch.zeros(rank, in_features, dtype=self.master_dtype))
        self.C = nn.Parameter(torch.zeros(layers, rank, dtype=self.master_dtype))
        # m_l, float32 as raw bytes: a bf16 conversion of the model must not round it.
        self.mix = frozen(torch.empty(layers, 4 * rank, dtype=torch.uint8))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return layers * min(out_features, in_features)

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, mix: Tensor) -> None:
        """Take over A, B, and the start of the mix, (layers, rank)."""
        self.A.copy_(up.to(self.dtype))
        self.B.copy_((down / self.down_rate).to(self.dtype))
        self.mix.copy_(_raw(mix))

    def down(self) -> Tensor:
        return self.B * self.down_rate if self.down_rate != 1 else self.B

    def core(self, layer: int) -> Tensor:
        return self.mix[layer].view(torch.float32) + self.rounded(self.C[layer])

    def up(self) -> Tensor:
        return self.A

    def trained(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.C]


class _FromZero(_Mixed):
    """A starts at zero, the rows of B are random, of length one."""

    def draw(self, generator: torch.Generator) -> None:
        down = unit_rows(self.B, generator)
        self.fill(torch.zeros_like(self.A), down.float(), self.start_of_mix(generator))

    def start_of_mix(self, generator: torch.Generator) -> Tensor:
        """(layers, rank)."""
        return torch.ones(self.layers, self.C.shape[1])


class LoRTASlow(_FromZero):
    """LoRTA whose B trains at a tenth of the rate."""

    down_rate = SLOW


class LoRTASigns(_FromZero):
    """LoRTA from a mix of random signs, so that layers start with different updates."""

    def start_of_mix(self, generator: torch.Generator) -> Tensor:
        signs = torch.randint(0, 2, self.C.shape, generator=generator)
        return 2.0 * signs - 1


class _Fitted(_FromZero):
    """The start is a T-SVD, of the weights or of their quantization error."""

    fits = True

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        slices: Slices,
        rank: int,
        transform: Tensor,
        dtype: torch.dtype,
        seed: int,
        starts: list[Tensor] | None = None,
    ) -> Fit:
        found, starts = t_svd(slices, cls.fitted(rank), seed, starts)
        with slices.device:
            factors = cls(*slices.shape, rank, dtype)
        factors.take(found, transform.to(found.slices.device)[:, found.slices], seed)
        counts = torch.bincount(found.slices, minlength=transform.shape[1])
        factors.slice_ranks = counts.tolist()
        return Fit(factors, found.values.square().sum().item(), starts)

    @staticmethod
    def fitted(rank: int) -> int:
        """Components of the decomposition, of `rank`."""
        return rank

    def take(self, found: TSVD, mix: Tensor, seed: int) -> None:
        """Start from a decomposition, with the roots of the singular values in A and B."""
        self.fill(*_balanced(found), mix)


class ReFTAMix(_Fitted):
    """ReFTA whose mix trains too."""


class ReFTAUnit(_Fitted):
    """ReFTA with a trained mix, rows of B of length one, and all of the singular values in A."""

    def take(self, found: TSVD, mix: Tensor, seed: int) -> None:
        lengths = found.right.norm(dim=1)
        up = found.left * (found.values * lengths)
        self.fill(up, found.right / lengths.unsqueeze(1), mix)


class ReFTAHalf(_Fitted):
    """R/2 frozen components, as ReFTA starts them, and R/2 from zero, as in LoRTA."""

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        kept = self.fitted(rank)
        super().__init__(layers, out_features, in_features, rank - kept, dtype)
        self.rank = rank
        self.left = frozen(torch.zeros(out_features, kept, dtype=self.master_dtype))
        self.right = frozen(torch.zeros(kept, in_features, dtype=self.master_dtype))
        self.kept_mix = frozen(torch.empty(layers, 4 * kept, dtype=torch.uint8))

    @staticmethod
    def fitted(rank: int) -> int:
        return rank // 2

    def take(self, found: TSVD, mix: Tensor, seed: int) -> None:
        self.draw(torch.Generator().manual_seed(seed))
        left, right = _balanced(found)
        self.left.copy_(left.to(self.dtype))
        self.right.copy_(right.to(self.dtype))
        self.kept_mix.copy_(_raw(mix))

    def down(self) -> Tensor:
        return torch.cat([self.right, super().down()])

    def core(self, layer: int) -> Tensor:
        return torch.cat([self.kept_mix[layer].view(torch.float32), super().core(layer)])

    def up(self) -> Tensor:
        return torch.cat([self.left, super().up()], dim=1)


def _balanced(found: TSVD) -> tuple[Tensor, Tensor]:
    """A and B with the roots of the singular values in each."""
    roots = found.values.sqrt()
    return found.left * roots, found.right * roots.unsqueeze(1)


def _raw(mix: Tensor) -> Tensor:
    """Float32 values as bytes, (layers, 4 rank)."""
    return mix.to(torch.float32).contiguous().view(torch.uint8)


FORMS: dict[str, type[Factors]] = {
    "lorta-signs": LoRTASigns,
    "lorta-slow": LoRTASlow,
    "refta-mix": ReFTAMix,
    "refta-unit": ReFTAUnit,
    "refta-half": ReFTAHalf,
}
