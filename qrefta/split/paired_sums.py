"""`PairedSums`: the inputs of a linear layer in the quantized and the 16-bit model, in sums."""

import torch
from torch import Tensor

from qrefta.split.moment_sums import accumulate, mirror_, moment_sum

# Shares of the mean of the diagonal of H that hold a target near its weight: of many tokens, and of
# few, times inputs / tokens. C of few tokens fits them and no others.
RIDGE = 0.1
RIDGE_OF_FEW = 2.0


class PairedSums:
    """Sums over tokens of x^^T x^, its upper half, and of (x - x^)^T x^.

    Args:
        example: some input of the layer.
    """

    def __init__(self, example: Tensor) -> None:
        self._tokens = 0
        none = example.new_zeros(0, example.shape[-1], dtype=torch.float32)
        self._moment = accumulate(None, moment_sum(none))
        self._shift: Tensor | None = None
        self._paired = self._moment.dim() == 2

    def add(self, quantized: list[Tensor], dense: list[Tensor]) -> None:
        """Add the inputs of one batch in both models, (tokens, in) for every call.

        If a layer gets other tokens in the quantized model, as an expert may, C is not known.
        """
        shapes = [[tensor.shape for tensor in tensors] for tensors in (quantized, dense)]
        self._paired &= shapes[0] == shapes[1]
        for number, given in enumerate(quantized):
            given = given.float()
            self._tokens += len(given)
            self._moment = accumulate(self._moment, moment_sum(given))
            if self._paired:
                self._shift = accumulate(self._shift, (dense[number].float() - given).T @ given)

    def moment(self) -> Tensor:
        """H; zeros if no token reached the layer."""
        return mirror_((self._moment / max(self._tokens, 1)).float())

    def correction(self) -> Tensor | None:
        """(C - H) (H + lambda I)^-1; None if C is not known, zero or not finite."""
        if not self._paired or self._shift is None or not self._shift.any():
            return None
        if not (self._shift.isfinite().all() and self._moment.isfinite().all()):
            return None  # `Moments.of` says so
        ridge = max(RIDGE, RIDGE_OF_FEW * len(self._moment) / self._tokens)
        matrix = mirror_(self._moment.clone())
        matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        return torch.cholesky_solve(self._shift.T, torch.linalg.cholesky(matrix)).T.float()
