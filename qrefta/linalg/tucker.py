"""The Tucker-3 decomposition of a stack: W_l ~ left (sum_k U[l, k] core_k) right, by its higher-order SVD.

Classically every mode's basis comes from the whole tensor (HOSVD: De Lathauwer, De Moor, Vandewalle 2000). Here each
comes from what the modes before it left, layers first, then inputs, then outputs: sequential truncation
(Vannieuwenhoven, Vandebril, Meerbergen 2012), which has the same error bound, mostly less error, and needs the stack by
rows only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.linalg.tsvd import Slices

_EXACT_SHARE = 6  # inputs of less than this many ranks: the exact subspace
_OVERSAMPLING = 8
_MOST_STEPS = 30
_TOLERANCE = 1e-3  # share of the captured energy that the last step may have won


class Tucker(NamedTuple):
    """A Tucker-3 approximation of the transformed slices: What_k ~ left core_k right.

    Attributes (float64):
        core: (slices kept, r_out, r_in).
        left: (out, r_out), orthonormal columns.
        right: (r_in, in), orthonormal rows; under a metric S, orthonormal rows times S^(-1/2).
        basis: of the input space, (in, r_in), orthonormal: where a fit to nearly the same slices may start.
    """

    core: Tensor
    left: Tensor
    right: Tensor
    basis: Tensor


def hosvd(
    slices: Slices, ranks: tuple[int, int, int], seed: int, start: Tensor | None = None
) -> Tucker:
    """The sequentially truncated higher-order SVD of the first slices of a stack.

    Under the transform lsm3 the first r_layer slices are the layer mode's truncation. With the input space no wider
    than 6 r_in the input basis is exact; else it comes from block power iterations that stop when a step wins less than
    0.001 of the captured energy.

    Passes: 2 where it is exact or has a start, else about 6. Memory beside a block: (in, in) where it is exact, else
    (in, r_in + 8); the projected slices, (r_layer, out, r_in), and a Gram matrix of them; float64.

    Args:
        slices: of a stack under lsm3, float32 or float64.
        ranks: r_layer, r_out, r_in, each at most its mode and the product of the two others.
        seed: of the random start; drawn on the CPU.
        start: the basis of an earlier decomposition; it then moves by one power iteration.
    """
    kept, r_out, r_in = ranks
    in_features = slices.shape[2]
    if in_features <= _EXACT_SHARE * r_in:
        basis = _exact_basis(slices, kept, r_in)
    elif start is not None:
        basis = torch.linalg.qr(_apply(slices, kept, start)).Q
    else:
        basis = _iterated_basis(slices, kept, r_in, torch.Generator().manual_seed(seed))
    metric = slices.metric
    thin = basis if metric is None else metric.apply(basis)
    projected = torch.cat([block[:kept].double() @ thin for _, block in slices.blocks()], dim=1)
    left = _leading_left(projected.transpose(0, 1).flatten(1), r_out)
    right = (basis if metric is None else metric.apply_inverse(basis)).T
    return Tucker(left.T @ projected, left, right, basis)


def _leading_left(matrix: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors, (rows, rank), through the smaller Gram matrix."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    return torch.linalg.qr(matrix @ right).Q


def _exact_basis(slices: Slices, kept: int, rank: int) -> Tensor:
    """Leading eigenvectors of the sum of What_k^T What_k, (in, rank)."""
    gram = torch.zeros(slices.shape[2], slices.shape[2], dtype=torch.float64, device=slices.device)
    for _, block in slices.blocks():
        rows = block[:kept].flatten(0, 1)
        gram += (rows.T @ rows).double()
    if slices.metric is not None:
        gram = slices.metric.apply(slices.metric.apply(gram).T)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def _iterated_basis(slices: Slices, kept: int, rank: int, generator: torch.Generator) -> Tensor:
    width = min(rank + _OVERSAMPLING, slices.shape[2])
    drawn = torch.randn(slices.shape[2], width, generator=generator, dtype=torch.float64)
    basis, captured = torch.linalg.qr(drawn.to(slices.device)).Q, 0.0
    for _ in range(_MOST_STEPS):
        images = _apply(slices, kept, basis)
        values, vectors = torch.linalg.eigh(basis.T @ images)
        leading = vectors.flip(1)[:, :rank]
        before, captured = captured, values.flip(0)[:rank].sum().item()
        if captured - before <= _TOLERANCE * captured:
            break
        basis = torch.linalg.qr(images).Q
    return basis @ leading


def _apply(slices: Slices, kept: int, vectors: Tensor) -> Tensor:
    """The sum of S^(1/2) What_k^T What_k S^(1/2) v, (in, columns), float64. One pass."""
    metric = slices.metric
    thin = vectors if metric is None else metric.apply(vectors)
    total = torch.zeros_like(thin)
    for _, block in slices.blocks():
        rows = block[:kept].flatten(0, 1)
        total += (rows.T @ (rows @ thin.to(rows.dtype))).double()
    return total if metric is None else metric.apply(total)
