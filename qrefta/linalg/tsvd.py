"""Pure maths of third-order tensors: mode-3 transforms and the tensor SVD. Tensors in, tensors out.

A stack is (layers, out, in). The mode-3 transform mixes layers with an orthogonal U (layers x
slices), into transformed slices T_k:

    T_k = sum_l U[l, k] W_l        W_l = sum_k U[l, k] T_k

Each slice has its SVD. The tensor rank-R approximation keeps the R largest singular values over all
slices together (T-SVD: Kilmer and Martin 2011; with a data-driven U: ReFTA, CVPR 2026).

A stack is read in blocks of rows of all its layers (`Blocks`) and is not needed in memory as a
whole; functions say how many passes over the blocks they make.

`t_svd` finds the right subspaces of large slices by a block Krylov method (`qrefta.linalg.krylov`);
the components are then taken from them in float64. With a metric S the slices are T_k S^(1/2),
formed on the thin side only, and the right vectors come back through S^(-1/2).
"""

import math
from typing import NamedTuple

import scipy.fft
import torch
from torch import Tensor

from qrefta.choices import TRANSFORMS
from qrefta.linalg.krylov import leading_subspaces
from qrefta.linalg.slices import Blocks, Slices

_GRAM_CHUNK = 1 << 16  # columns of the mode-3 unfolding that are held in float64 at once
_OVERSAMPLING = 5  # least directions of every slice beyond its share of the rank
_SPARE = 16  # directions of every slice that are handed on beyond the kept ones
_WIDTH = 8  # products of this many columns, or a multiple, take the least time a column
# A basis of this many blocks is not small next to the slice: decompose it exactly.
_EXACT_SHARE = 6
# A sum of squares below this may have lost terms that are too small for float32.
_LEAST_SQUARE = 1e-28


class TSVD(NamedTuple):
    """Leading tensor singular values of a stack under a mode-3 transform, largest first.

    Attributes (float64):
        left: (out, rank), unit columns.
        values: (rank,).
        right: (rank, in), unit rows; under a metric S, unit rows times S^(-1/2).
        slices: (rank,) int64, the transformed slice that each component belongs to.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    slices: Tensor


def squared_norm(matrix: Tensor) -> float:
    """||matrix||_F^2, summed in float64 over float32 norms of rows.

    If these leave the range of float32, all is summed in float64.
    """
    row_norms = torch.linalg.vector_norm(matrix, dim=-1).double()
    total = row_norms.square().sum().item()
    if _LEAST_SQUARE < total < math.inf:
        return total
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()


def mode3_gram(blocks: Blocks, layers: int) -> Tensor:
    """Inner products <W_k, W_l> of a stack's layers, (layers, layers), float64. One pass."""
    gram: Tensor | None = None
    for _, block in blocks():
        for columns in block.reshape(layers, -1).split(_GRAM_CHUNK, dim=1):
            chunk = columns.double()
            product = chunk @ chunk.T
            gram = product if gram is None else gram.add_(product)
    assert gram is not None, "a stack has rows"
    return gram


def transform_matrix(blocks: Blocks, layers: int, transform: str) -> Tensor:
    """Orthogonal mode-3 transform U of a stack, (layers, slices), float64; column k makes slice k.

    - `lsm3`: left singular vectors of the mode-3 unfolding, strongest slice first, as eigenvectors
      of the small Gram matrix in float64. They depend on the data and compact the energy best. One
      pass.
    - `dct`: orthonormal DCT-II; it needs no data.
    - `identity`: no mixing. The t-SVD becomes an SVD of each layer under one rank budget.

    Raises:
        ValueError: for another transform.
    """
    if transform == "lsm3":
        vectors = torch.linalg.eigh(mode3_gram(blocks, layers)).eigenvectors.flip(1)
        return vectors * _signs(vectors, dim=0)
    identity = torch.eye(layers, dtype=torch.float64)
    if transform == "dct":
        rows = scipy.fft.dct(identity.numpy(), type=2, norm="ortho", axis=0)
        return torch.from_numpy(rows).T.contiguous()
    if transform == "identity":
        return identity
    raise ValueError(f"transform is {transform!r}; it must be one of {', '.join(TRANSFORMS)}")


def mix(block: Tensor, transform: Tensor) -> Tensor:
    """T_k for a block of rows of all layers, (layers, rows, in), in its dtype."""
    identity = torch.eye(len(transform), dtype=transform.dtype, device=transform.device)
    if torch.equal(transform, identity):
        return block
    columns = transform.to(block.device, block.dtype)
    mixed = columns.T @ block.reshape(len(block), -1)
    return mixed.view(block.shape)


def t_svd_exact(slices: Slices, rank: int) -> TSVD:
    """The `rank` largest tensor singular values with their vectors, by exact SVDs in float64.

    The tests compare `t_svd` with it, which takes the same path for small slices. There are exactly
    `rank` components, whatever the ranks of the slices; ties go to the lower slice, then the lower
    index; the largest entry of every left vector is positive. One pass; memory: the slices, in
    float64.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
    """
    return _strongest(_svd_of_slices(slices), rank, slices)


def t_svd(
    slices: Slices, rank: int, seed: int, starts: list[Tensor] | None = None
) -> tuple[TSVD, list[Tensor]]:
    """The `rank` largest tensor singular values with vectors, and the right subspace of each slice.

    As `t_svd_exact`, up to less than 0.001 of the energy at the slices' default tolerance, by a
    block Krylov method. Small slices, if the basis would fill a large part of them, are decomposed
    exactly.

    The subspaces, (in, columns), orthonormal, float64, hold a few directions more than were kept,
    so that `refit` can start from them.

    Passes: 5 to 15 as a rule. Memory besides a block: the bases of all slices, (in, about 6 R + 50
    slices) in float32.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
        seed: of the random start; drawn on the CPU, so it does not depend on the device.
        starts: subspaces of an earlier decomposition of nearly the same slices, for a `refit`.
    """
    if starts is not None:
        return refit(slices, rank, starts)
    count, out_features, in_features = slices.shape
    wanted = math.ceil(rank / count) + _OVERSAMPLING
    width = math.ceil(wanted / _WIDTH) * _WIDTH
    if _EXACT_SHARE * width >= min(out_features, in_features):
        parts = _svd_of_slices(slices)
        shares = _shares([part.values for part in parts], rank)
        pairs = zip(parts, shares, strict=True)
        starts = [part.right[:, : share + _SPARE] for part, share in pairs]
        return _strongest(parts, rank, slices), starts
    subspaces = leading_subspaces(slices, rank, width, seed)
    shares = _shares([subspace.values for subspace in subspaces], rank)
    starts = []
    for subspace, share in zip(subspaces, shares, strict=True):
        leading = subspace.basis.double() @ subspace.vectors[:, : share + _SPARE]
        starts.append(torch.linalg.qr(leading).Q)
    return refit(slices, rank, starts)


def refit(slices: Slices, rank: int, starts: list[Tensor]) -> tuple[TSVD, list[Tensor]]:
    """The best `rank` components within right subspaces, and subspaces for the next refit.

    One pass. It is for slices that changed little since the subspaces were found, as between rounds
    of refinement. The subspaces that it returns hold the kept components, so that the next refit
    cannot do worse than keep them, and T^T T times these, so that it can do better (a step of the
    block conjugate-gradient method without its memory).

    Args:
        slices: float32 or float64.
        rank: 1 .. columns of all subspaces.
        starts: for every slice, (in, columns), orthonormal, float64.
    """
    images, back = slices.multiply(starts)
    squares = []
    turns = []
    for image in images:
        values, vectors = torch.linalg.eigh(image.double().T @ image.double())
        squares.append(values.flip(0).clamp(min=0))
        turns.append(vectors.flip(1))
    shares = _shares(squares, rank)
    parts = []
    following = []
    most = min(slices.shape[1:])
    for index, start in enumerate(starts):
        turn = turns[index]
        parts.append(_part_within(images[index], start, turn[:, : shares[index]]))
        leading = turn[:, : shares[index] + _SPARE]
        kept = start @ leading
        moved = back[index].double() @ leading
        pair = torch.cat([kept, moved - kept @ (kept.T @ moved)], dim=1)
        following.append(torch.linalg.qr(pair[:, :most]).Q)
    return _strongest(parts, rank, slices), following


class _Part(NamedTuple):
    """Singular triplets of one slice, largest first: (out, n), (n,), (in, n), float64."""

    left: Tensor
    values: Tensor
    right: Tensor


def _part_within(image: Tensor, start: Tensor, turn: Tensor) -> _Part:
    """Singular triplets within a subspace.

    Args:
        image: the slice times the basis of the subspace, (out, columns).
        start: the basis, (in, columns).
        turn: the wanted directions within the basis, (columns, n).
    """
    left, values, within = torch.linalg.svd(image.double() @ turn, full_matrices=False)
    return _Part(left, values, start @ (turn @ within.T))


def _svd_of_slices(slices: Slices) -> list[_Part]:
    """All singular triplets of every slice."""
    parts = []
    for matrix in torch.cat([block for _, block in slices.blocks()], dim=1):
        weighted = slices.weighted(matrix.double().T).T
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        parts.append(_Part(left, values, right.T))
    return parts


def _strongest(parts: list[_Part], rank: int, slices: Slices) -> TSVD:
    """The `rank` largest components of all slices; a tie goes to the lower slice, then index."""
    values = torch.cat([part.values for part in parts])
    owners = _owners([part.values for part in parts])
    order = values.argsort(descending=True, stable=True)[:rank]
    left = torch.cat([part.left for part in parts], dim=1)[:, order]
    right = torch.cat([part.right for part in parts], dim=1)[:, order]
    signs = _signs(left, dim=0)
    right = slices.unweighted(right) * signs
    return TSVD(left * signs, values[order], right.T, owners[order])


def _shares(values: list[Tensor], rank: int) -> list[int]:
    """How many of the `rank` largest values belong to each slice."""
    order = torch.cat(values).argsort(descending=True, stable=True)[:rank]
    return torch.bincount(_owners(values)[order], minlength=len(values)).tolist()


def _owners(values: list[Tensor]) -> Tensor:
    """The index of the slice of every value, (all values,), int64."""
    indices = [torch.full_like(part, index) for index, part in enumerate(values)]
    return torch.cat(indices).long()


def _signs(vectors: Tensor, dim: int) -> Tensor:
    """+1 or -1 that makes the entry of largest magnitude positive along `dim` (kept as size 1)."""
    peak = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)
