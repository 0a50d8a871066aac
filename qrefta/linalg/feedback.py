"""Rounding with error feedback: the columns of a matrix are rounded one after the other, and each
takes in the errors of the columns before it. Tensors in, tensors out.

The error of a layer's outputs is tr(E H E^T), for E = W - V and the second moment of its inputs H.
With the factorization H = M D M^T, M unit upper triangular and D diagonal,

    tr(E H E^T) = sum_k D_k ||(E M)_k||^2        (E M)_k = E_k + sum_{j < k} E_j M_jk

so the best V_k, given the columns before it, is the value nearest to W_k + sum_{j < k} E_j M_jk.
This is GPTQ (Frantar et al., arXiv 2210.17323), which reads M from the inverse of H, in the form of
LDLQ (Chee et al., arXiv 2307.13304, theorem 6), which needs no inverse.

Rows are independent of each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_PANEL = 64  # columns that are updated one by one; farther columns are updated by one product
_FACTOR_PANEL = 512  # columns that are factorized at once


def unit_factor(moment: Tensor, damping: float) -> Tensor:
    """M of moment + damping mean(diag) I = M D M^T: unit upper triangular, (in, in), float32.

    A Cholesky factorization from the last column to the first, in panels, written over one copy.
    Up to 2,048 columns are computed in float64; wider ones in float32, as GPTQ does. Memory: in^2
    numbers of that dtype, and 2,048 bytes a column. A moment of zeros gives the identity.

    Args:
        moment: H, (in, in), symmetric, positive semidefinite.
        damping: share of the mean of the diagonal that is added to it.

    Raises:
        torch.linalg.LinAlgError: if rounding leaves the damped moment indefinite.
    """
    width = len(moment)
    mean = moment.diagonal().mean().item()
    if mean <= 0:
        return torch.eye(width, device=moment.device)
    dtype = torch.float64 if width <= 2048 else torch.float32
    work = moment.to(dtype, copy=True)
    work.diagonal().add_(damping * mean)
    for stop in range(width, 0, -_FACTOR_PANEL):
        start = max(stop - _FACTOR_PANEL, 0)
        corner = _upper_cholesky(work[start:stop, start:stop])
        rest = work[:start, start:stop]
        # rest becomes rest corner^-T
        solved = torch.linalg.solve_triangular(corner.T, rest, upper=False, left=False)
        diagonal = corner.diagonal()
        work[start:stop, start:stop] = corner / diagonal
        rest.copy_(solved / diagonal)
        for left in range(0, start, _FACTOR_PANEL):  # the upper triangle of the product only
            right = min(left + _FACTOR_PANEL, start)
            work[:right, left:right].addmm_(solved[:right], solved[left:right].T, alpha=-1)
    return work.triu_().float()


def round_columns(
    matrix: Tensor, unit: Tensor, round_column: Callable[[int, Tensor], Tensor]
) -> None:
    """Call `round_column(k, target)` for every column k in order, with error feedback.

    Memory: three copies of the matrix.

    Args:
        matrix: W, (rows, in), float32.
        unit: M, from `unit_factor`.
        round_column: takes W_k + sum_{j < k} E_j M_jk, (rows,), and returns V_k.
    """
    columns = matrix.T.contiguous()
    errors = torch.empty_like(columns)
    width = len(columns)
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        targets = columns[start:stop].clone()
        if start:
            targets.addmm_(unit[:start, start:stop].T, errors[:start])
        for k in range(start, stop):
            torch.sub(columns[k], round_column(k, targets[k - start]), out=errors[k])
            targets[k - start + 1 :].addr_(unit[k, k + 1 : stop], errors[k])


def _upper_cholesky(matrix: Tensor) -> Tensor:
    """R of matrix = R R^T, upper triangular: the Cholesky factor in reversed order."""
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    return lower.flip(0, 1)
