"""The Tucker-3 decomposition of a stack, by its higher-order SVD.

    W_l ~ left (sum_k U[l, k] core_k) right

Classically every mode's basis comes from the whole tensor (HOSVD: De Lathauwer, De Moor, Vandewalle
2000). Here each comes from the tensor that the modes before it left, layers first, then inputs,
then outputs: sequential truncation (Vannieuwenhoven, Vandebril, Meerbergen 2012). It has the same
error bound, mostly less error, and needs the stack by rows only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.linalg.slices import Slices

_EXACT_SHARE = 6  # inputs of less than this many ranks: the exact subspace
_OVERSAMPLING = 8
_MOST_STEPS = 30
_TOLERANCE = 1e-3  # largest share of the captured energy that the last step wins


class Tucker(NamedTuple):
    """A Tucker-3 approximation of the transformed slices: T_k ~ left core_k right.

    Attributes (float64):
        core: (slices kept, r_out, r_in).
        left: (out, r_out), orthonormal columns.
        right: (r_in, in), orthonormal rows; under a metric S, orthonormal rows times S^(-1/2).
        basis: of the input space, (in, r_in), orthonormal: a fit to nearly the same slices may
            start from it.
    """

    core: Tensor
    left: Tensor
    right: Tensor
    basis: Tensor


def hosvd(
    slices: Slices, ranks: tuple[int, int, int], seed: int, start: Tensor | None = None
) -> Tucker:
    """The sequentially truncated higher-order SVD of the first slices of a stack.

    Under the transform lsm3 the first r_layer slices are the truncation of the layer mode. If the
    input space is no wider than 6 r_in, the input basis is exact; else it comes from block power
    iterations, which stop when a step wins less than 0.001 of the captured energy.

    Passes: 2 if the basis is exact or has a start, else about 6. Memory besides a block: (in, in)
    if it is exact, else (in, r_in + 8); the projected slices, (r_layer, out, r_in), and a Gram
    matrix of them; float64.

    Args:
        slices: of a stack under lsm3, float32 or float64.
        ranks: r_layer, r_out, r_in, each at most its mode and the product of the two others.
        seed: of the random start; drawn on the CPU.
        start: the basis of an earlier decomposition; it then moves by one power iteration.
    """
    kept, r_out, r_in = ranks
    if slices.shape[2] <= _EXACT_SHARE * r_in:
        basis = _exact_basis(slices, kept, r_in)
    elif start is not None:
        basis = torch.linalg.qr(_apply(slices, kept, start)).Q
    else:
        basis = _iterated_basis(slices, kept, r_in, torch.Generator().manual_seed(seed))
    thin = slices.weighted(basis)
    projected = torch.cat([block[:kept].double() @ thin for _, block in slices.blocks()], dim=1)
    left = _leading_left(projected.transpose(0, 1).flatten(1), r_out)
    right = slices.unweighted(basis).T
    return Tucker(left.T @ projected, left, right, basis)


def _leading_left(matrix: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors, (rows, rank), through the smaller Gram matrix."""
    rows, columns = matrix.shape
    if rows <= columns:
        return _leading_eigenvectors(matrix @ matrix.T, rank)
    right = _leading_eigenvectors(matrix.T @ matrix, rank)
    return torch.linalg.qr(matrix @ right).Q


def _leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :rank]


def _exact_basis(slices: Slices, kept: int, rank: int) -> Tensor:
    """Leading eigenvectors of the sum of T_k^T T_k, (in, rank)."""
    in_features = slices.shape[2]
    gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=slices.device)
    for _, block in slices.blocks():
        rows = block[:kept].flatten(0, 1)
        gram += (rows.T @ rows).double()
    gram = slices.weighted(slices.weighted(gram).T)
    return _leading_eigenvectors(gram, rank)


def _iterated_basis(slices: Slices, kept: int, rank: int, generator: torch.Generator) -> Tensor:
    """The same by block power iterations."""
    in_features = slices.shape[2]
    width = min(rank + _OVERSAMPLING, in_features)
    drawn = torch.randn(in_features, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn.to(slices.device)).Q
    leading = torch.eye(width, rank, dtype=torch.float64, device=slices.device)
    captured = 0.0
    for _ in range(_MOST_STEPS):
        images = _apply(slices, kept, basis)
        values, vectors = torch.linalg.eigh(basis.T @ images)
        leading = vectors.flip(1)[:, :rank]
        before = captured
        captured = values.flip(0)[:rank].sum().item()
        if captured - before <= _TOLERANCE * captured:
            break
        basis = torch.linalg.qr(images).Q
    return basis @ leading


def _apply(slices: Slices, kept: int, vectors: Tensor) -> Tensor:
    """The sum of S^(1/2) T_k^T T_k S^(1/2) v, (in, columns), float64. One pass."""
    thin = slices.weighted(vectors)
    total = torch.zeros_like(thin)
    for _, block in slices.blocks():
        rows = block[:kept].flatten(0, 1)
        images = rows @ thin.to(rows.dtype)
        total += (rows.T @ images).double()
    return slices.weighted(total)
