"""Pure maths of third-order tensors: mode-3 transforms and the tensor SVD. Tensors in, tensors out.

A stack is (layers, out, in). The mode-3 transform mixes layers with an orthogonal U (layers x slices):

    What_k = sum_l U[l, k] W_l        W_l = sum_k U[l, k] What_k

Each transformed slice has its own SVD; the tensor rank-R approximation keeps the R largest singular values over all
slices together (T-SVD: Kilmer and Martin 2011; with a data-driven U: ReFTA, CVPR 2026).
"""

from typing import Literal, NamedTuple, get_args

import scipy.fft
import torch
from torch import Tensor

Transform = Literal["lsm3", "dct", "identity"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)

_GRAM_CHUNK = 1 << 20  # columns of the mode-3 unfolding that are held in float64 at once


class TSVD(NamedTuple):
    """Leading tensor singular values of a stack under a mode-3 transform, largest first.

    Attributes:
        left: (out, rank), unit columns.
        values: (rank,).
        right: (rank, in), unit rows.
        slices: (rank,) int64, the transformed slice that each component belongs to.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    slices: Tensor


def mode3_gram(stack: Tensor) -> Tensor:
    """Inner products <W_k, W_l> of a stack's slices, (layers, layers), float64, in chunks of columns."""
    unfolding = stack.reshape(stack.shape[0], -1)
    gram = torch.zeros(stack.shape[0], stack.shape[0], dtype=torch.float64, device=stack.device)
    for columns in unfolding.split(_GRAM_CHUNK, dim=1):
        chunk = columns.double()
        gram += chunk @ chunk.T
    return gram


def transform_matrix(stack: Tensor, transform: Transform) -> Tensor:
    """Orthogonal mode-3 transform U of a stack, (layers, slices), float64; column k makes slice k.

    `lsm3`: left singular vectors of the mode-3 unfolding, strongest slice first, as eigenvectors of the small Gram
    matrix in float64 (they depend on the data and compact the energy best). `dct`: orthonormal DCT-II, no data needed.
    `identity`: no mixing; the t-SVD becomes an SVD of each layer under one rank budget.

    Raises:
        ValueError: for another transform.
    """
    layers = stack.shape[0]
    if transform == "lsm3":
        vectors = torch.linalg.eigh(mode3_gram(stack)).eigenvectors.flip(1)
        return vectors * _signs(vectors, dim=0)
    if transform == "dct":
        rows = scipy.fft.dct(torch.eye(layers, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=0)
        return torch.from_numpy(rows).T.contiguous().to(stack.device)
    if transform == "identity":
        return torch.eye(layers, dtype=torch.float64, device=stack.device)
    raise ValueError(f"transform is {transform!r}; it must be one of {', '.join(TRANSFORMS)}")


def transformed_slice(stack: Tensor, transform: Tensor, index: int) -> Tensor:
    """What_k = sum_l U[l, k] W_l, (out, in), in the stack's dtype."""
    return torch.tensordot(transform[:, index].to(stack.dtype), stack, dims=1)


def t_svd(stack: Tensor, transform: Tensor, rank: int) -> TSVD:
    """The `rank` largest tensor singular values of a stack with their vectors, by an exact SVD of each slice.

    Exactly `rank` components, whatever the slices' own ranks; ties go to the lower slice, then the lower index; the
    largest entry of every left vector is positive. One slice is decomposed at a time.

    Args:
        stack: (layers, out, in), float32 or float64.
        transform: (layers, slices), orthogonal.
        rank: 1 .. layers * min(out, in).
    """
    best: TSVD | None = None
    for index in range(stack.shape[0]):
        left, values, right = torch.linalg.svd(transformed_slice(stack, transform, index), full_matrices=False)
        kept = min(rank, values.numel())
        slices = torch.full((kept,), index, device=stack.device)
        found = TSVD(left[:, :kept], values[:kept], right[:kept], slices)
        best = found if best is None else _strongest(best, found, rank)
    signs = _signs(best.left, dim=0)
    return best._replace(left=best.left * signs, right=best.right * signs.T)


def _strongest(first: TSVD, second: TSVD, rank: int) -> TSVD:
    """The `rank` largest components of two; a tie goes to the first."""
    order = torch.cat([first.values, second.values]).argsort(descending=True, stable=True)[:rank]
    return TSVD(
        torch.cat([first.left, second.left], dim=1)[:, order],
        torch.cat([first.values, second.values])[order],
        torch.cat([first.right, second.right])[order],
        torch.cat([first.slices, second.slices])[order],
    )


def _signs(vectors: Tensor, dim: int) -> Tensor:
    """+1 or -1 that makes the entry of largest magnitude positive along `dim` (kept as size 1)."""
    peak = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)
