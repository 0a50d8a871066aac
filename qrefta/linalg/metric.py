"""The metric of a linear layer's inputs, from their second moment: tensors in, tensors out.

The error of a layer's outputs is E||x W^T - x V^T||^2 = tr(E S E^T), for E = W - V and the second
moment of the inputs S = E[x^T x]. So a decomposition that is to keep the outputs is made of W
S^(1/2), and comes back through S^(-1/2).

S is a full matrix (in, in), or a diagonal one that is kept as a vector (in,).
"""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4  # share of the mean of the diagonal that is added to it, see `normalized`
_ROWS = 1024  # rows of an error matrix that are multiplied at once
_COLUMNS = 512  # of these rows, with the moment's entries above its diagonal blocks taken twice


class Metric(NamedTuple):
    """A symmetric positive definite S on the input space, by its roots.

    Attributes:
        root, inverse_root: S^(1/2) and S^(-1/2), each (in, in), or (in,) for a diagonal S.
    """

    root: Tensor
    inverse_root: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """S^(1/2) vectors, (in, columns), in the dtype and on the device of the vectors."""
        return _times(self.root.to(vectors), vectors)

    def apply_inverse(self, vectors: Tensor) -> Tensor:
        """S^(-1/2) vectors, (in, columns), in the dtype and on the device of the vectors."""
        return _times(self.inverse_root.to(vectors), vectors)


def normalized(moment: Tensor) -> Tensor:
    """A moment with a ridge and the mean 1 on its diagonal; the identity for S = 0.

        (S + RIDGE m I) / ((1 + RIDGE) m)        m = mean(diag S)

    Every eigenvalue is RIDGE / (1 + RIDGE) or more, so S^(-1/2) is at most about 100 and does not
    amplify rounding.

    Args:
        moment: S, (in, in) or (in,).
    """
    full = moment.dim() == 2
    diagonal = moment.diagonal() if full else moment
    ones = torch.ones_like(diagonal)
    identity = ones.diag() if full else ones
    mean = diagonal.mean()
    if mean <= 0:
        return identity
    return (moment / mean + RIDGE * identity) / (1 + RIDGE)


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """S^(1/2) and S^(-1/2) of a mean of `normalized` moments, each in the shape of S.

    Eigenvalues that rounding has put under their lower bound are raised to it.

    Args:
        matrix: S, (in, in) or (in,), float64.
    """
    lower_bound = RIDGE / (1 + RIDGE)
    if matrix.dim() == 1:
        root = matrix.clamp(min=lower_bound).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=lower_bound).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def output_error(errors: Tensor, moment: Tensor) -> float:
    """E||x E^T||^2 = tr(E S E^T) of a layer: products in float32, the sum in float64.

    Args:
        errors: E, the weight minus the stored weight, (out, in).
        moment: S = E[x^T x], (in, in) or its diagonal (in,).
    """
    moment = moment.to(errors.device, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=errors.device)
    for rows in errors.float().split(_ROWS):
        total += _weighted_square(rows, moment)
    return total.item()


def _weighted_square(rows: Tensor, moment: Tensor) -> Tensor:
    """The sum of E S E^T's diagonal over some rows E, float64, with half of S where it is full."""
    if moment.dim() == 1:
        return (rows.square() * moment).sum(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(moment), _COLUMNS):
        stop = min(start + _COLUMNS, len(moment))
        panel = rows[:, start:stop]
        images = panel @ moment[start:stop, start:stop]
        images.addmm_(rows[:, :start], moment[:start, start:stop], alpha=2)
        total += (images * panel).sum(dtype=torch.float64)
    return total


def _times(operator: Tensor, vectors: Tensor) -> Tensor:
    """The product of a full (in, in) or diagonal (in,) operator with vectors (in, columns)."""
    if operator.dim() == 1:
        return operator.unsqueeze(1) * vectors
    return operator @ vectors
