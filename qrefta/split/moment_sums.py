"""Sums of x^T x over batches of tokens, whose means are second moments."""

import torch
from torch import Tensor

# Wider inputs keep only the diagonal: a full matrix of this width has 1.1 GB.
FULL_WIDTH = 16384
DOUBLE_WIDTH = 1024  # sums up to this width are float64; wider sums are float32, in half the memory
PANEL = 128  # columns of x^T x that are computed at once; narrower products are slower


def moment_sum(rows: Tensor) -> Tensor:
    """The sum of x^T x over rows (tokens, in), by panels of PANEL columns.

    Returns:
        (in, in), zero below the panels on the diagonal: `mirror_` completes it. For inputs wider
        than FULL_WIDTH the diagonal (in,).
    """
    width = rows.shape[1]
    if width > FULL_WIDTH:
        return rows.double().square().sum(0)
    upper = rows.new_zeros(width, width)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        torch.mm(rows[:, :stop].T, rows[:, start:stop], out=upper[:stop, start:stop])
    return upper


def accumulate(total: Tensor | None, product: Tensor) -> Tensor:
    """A sum of products over batches, in place: full ones wider than DOUBLE_WIDTH are float32."""
    if total is not None:
        return total.add_(product)
    wide = DOUBLE_WIDTH < len(product) <= FULL_WIDTH
    return product.to(torch.float32 if wide else torch.float64)


def mirror_(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper half, in place; a diagonal (in,) as it is."""
    if upper.dim() == 1:
        return upper
    for start in range(0, len(upper), PANEL):
        stop = start + PANEL
        block = upper[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


def no_moment(width: int) -> Tensor:
    """The moment of a linear layer that no token reached, zeros (in,)."""
    return torch.zeros(width, dtype=torch.float32, device="cpu")
