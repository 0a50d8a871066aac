"""Right subspaces of the slices of a stack that hold its largest singular values.

A block Krylov method (Musco and Musco 2015) on the operators M_k = T_k^T T_k, for all slices T_k in
one pass. Every step multiplies the newest directions of each slice and orthogonalizes the result
against the slice's basis. Singular values are read off the small projected matrix (Rayleigh-Ritz).
Bases are float32, as the weights are; projected matrices are float64.

The rank is one budget for all slices, so slices are treated differently. A slice whose largest
singular value, by its Ritz value and residual, is below the R-th largest found so far is not grown
any more. A slice that needs many more directions than the others gets wider blocks. So the work
grows with R + slices, not with their product.
"""

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.linalg.slices import Slices

# Least and largest ratio of two gains that the estimate believes.
_FASTEST = 0.5
_SLOWEST = 0.9
_MOST_STEPS = 60
# Part of a unit vector outside the basis that is too small to stand for the vector.
_DEPENDENT = 1e-3
_ROUNDING = 1e-6  # of float32 products, relative to the largest


class Subspace(NamedTuple):
    """Ritz values and vectors of one slice.

    Attributes:
        basis: (in, columns), orthonormal.
        values: squared singular values found, (columns,), largest first.
        vectors: the Ritz vectors within the basis, (columns, columns).
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor


def leading_subspaces(slices: Slices, rank: int, width: int, seed: int) -> list[Subspace]:
    """For every slice, a subspace with its share of the `rank` largest singular values of all.

    Bases grow until the captured energy has no more than the tolerance of the slices to win, by a
    cautious estimate from its last two gains.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
        width: directions that every slice starts with.
        seed: of the random start; drawn on the CPU, so it does not depend on the device.
    """
    groups = [_Group(slices, width, torch.Generator().manual_seed(seed))]
    captured = 0.0
    last_gain = 0.0
    for step in range(_MOST_STEPS):
        growing = [group for group in groups if group.newest.shape[2]]
        if not growing:
            break
        _multiply(slices, groups, growing)
        # Values are computed after every second step: a large basis takes as long to solve as to
        # multiply.
        if step % 2 == 0 and all(group.size < group.limit for group in growing):
            for group in growing:
                group.extend()
            continue
        for group in growing:
            group.solve()
        values = torch.cat([group.values.flatten() for group in groups])
        best = values.topk(rank).values
        gain = best.sum().item() - captured
        captured += gain
        saturated = [group.saturated(best) for group in groups]
        enough = _left_to_win(gain, last_gain) <= slices.tolerance * captured
        if enough and not any(full.any() for full in saturated):
            break
        last_gain = gain
        groups = [
            part
            for group, full in zip(groups, saturated, strict=True)
            for part in _next(group, best[-1], full)
        ]
    return _in_order(groups)


def _left_to_win(gain: float, last_gain: float) -> float:
    """Sum of all further gains, if each is smaller than the one before by the last ratio."""
    ratio = _SLOWEST
    if last_gain > 0:
        ratio = min(max(gain / last_gain, _FASTEST), _SLOWEST)
    return gain * ratio / (1 - ratio)


class _Group:
    """Krylov bases of slices that grow by blocks of one width, and their Rayleigh-Ritz values.

    Attributes:
        members: the n slices.
        basis: (n, in, columns), orthonormal.
        projected: M within the basis, (n, columns, columns).
        newest: (n, in, width), orthonormal to the basis; M has not been applied to them yet. Width
            0: the slices are not grown any more.
        remainder: M times the last block, without its part in the basis, (n, in, width).
        values: Ritz values, (n, columns), largest first; set by `solve`.
        vectors: the Ritz vectors within the basis, (n, columns, columns).
        residual: ||M v - value v|| of the largest value, (n,).
        limit: columns of a basis at which it holds every singular vector.
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor
    remainder: Tensor

    def __init__(self, slices: Slices, width: int, generator: torch.Generator) -> None:
        count, out_features, in_features = slices.shape
        self.members = torch.arange(count)
        self.limit = min(out_features, in_features)
        self.generator = generator
        self.basis = torch.empty(count, in_features, 0, dtype=torch.float32, device=slices.device)
        self.projected = torch.empty(count, 0, 0, dtype=torch.float64, device=slices.device)
        self.newest = torch.linalg.qr(self._random(width)).Q

    @property
    def size(self) -> int:
        """Columns of the basis."""
        return self.basis.shape[2]

    def part(self, chosen: Tensor) -> "_Group":
        """Some of the slices, by a mask (n,)."""
        part = copy(self)
        part.members = self.members[chosen.cpu()]
        for name in ("basis", "projected", "newest", "values", "vectors", "residual", "remainder"):
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def absorb(self, images: Tensor) -> None:
        """Take in M times the newest directions."""
        old = self.size
        more = images.shape[2]
        self.basis = torch.cat([self.basis, self.newest.to(images)], dim=2)
        coupling = self.basis.mT @ images
        self.projected = torch.nn.functional.pad(self.projected, (0, more, 0, more))
        self.projected[:, :, old:] = coupling
        self.projected[:, old:, :old] = coupling[:, :old].mT
        self.remainder = images - self.basis @ coupling
        self.newest = self.newest[:, :, :0]

    def solve(self) -> None:
        """Rayleigh-Ritz: the values and vectors of M within the basis."""
        values, vectors = torch.linalg.eigh(self.projected)
        self.values = values.flip(1).clamp(min=0)
        self.vectors = vectors.flip(2)
        width = self.remainder.shape[2]
        last = self.vectors[:, -width:, :1].to(self.remainder)
        self.residual = (self.remainder @ last).norm(dim=1)[:, 0]

    def extend(self, more: int = 0) -> None:
        """Next directions: the remainder, and `more` random ones."""
        directions = self.remainder
        if more:
            directions = torch.cat([directions, self._random(more).to(directions)], dim=2)
        directions = directions[:, :, : self.limit - self.size]
        sizes = directions.norm(dim=1, keepdim=True)
        largest = self.projected.abs().amax(dim=(1, 2), keepdim=True)
        spent = sizes <= _ROUNDING * largest
        if spent.any():
            # M maps the basis to itself, and only rounding is left: look in random directions.
            random = self._random(directions.shape[2]).to(directions)
            directions = torch.where(spent, random, directions)
            sizes = directions.norm(dim=1, keepdim=True)
        self.newest, triangles = torch.linalg.qr(self._outside(directions / sizes))
        diagonal = triangles.diagonal(dim1=1, dim2=2).abs()
        if (diagonal < _DEPENDENT).any():
            # For parallel columns QR makes up columns, which may lie in the basis.
            self.newest = torch.linalg.qr(self._outside(self.newest)).Q

    def saturated(self, best: Tensor) -> Tensor:
        """Whether kept values take up so much of a basis that it may hide more, (n,).

        Args:
            best: the values kept of all slices, largest first.
        """
        least = best[-1].clamp(min=_ROUNDING * best[0])
        kept = (self.values > least).sum(dim=1)
        return (2 * kept > self.size) & (self.size < self.limit)

    def _outside(self, directions: Tensor) -> Tensor:
        """Directions without their part in the basis."""
        return directions - self.basis @ (self.basis.mT @ directions)

    def _random(self, columns: int) -> Tensor:
        count, in_features, _ = self.basis.shape
        size = (count, in_features, columns)
        drawn = torch.randn(size, generator=self.generator, dtype=torch.float32)
        return drawn.to(self.basis.device)


def _multiply(slices: Slices, groups: list[_Group], growing: list[_Group]) -> None:
    """Apply M to the newest directions of all groups, and hand the images to the growing ones."""
    newest = {
        member: directions
        for group in groups
        for member, directions in zip(group.members.tolist(), group.newest, strict=True)
    }
    _, images = slices.multiply([newest[member] for member in range(len(newest))])
    for group in growing:
        group.absorb(torch.stack([images[member] for member in group.members]))


def _next(group: _Group, threshold: Tensor, saturated: Tensor) -> list[_Group]:
    """The slices of a group, divided by how they go on.

    They are left alone, grow by a block, or, if they are saturated, by as many directions as there
    are already.

    Args:
        threshold: the smallest value kept of all slices.
        saturated: (n,).
    """
    alone = group.values[:, 0] + group.residual < threshold
    parts = []
    if alone.any():
        parts.append(_part(group, alone))
    for chosen, more in ((~alone & ~saturated, 0), (~alone & saturated, group.size)):
        if chosen.any():
            part = _part(group, chosen)
            part.extend(more)
            parts.append(part)
    return parts


def _part(group: _Group, chosen: Tensor) -> _Group:
    return group if chosen.all() else group.part(chosen)


def _in_order(groups: list[_Group]) -> list[Subspace]:
    """The subspaces of all slices, in the order of the slices."""
    subspaces = {}
    for group in groups:
        for index, member in enumerate(group.members.tolist()):
            subspaces[member] = Subspace(
                group.basis[index], group.values[index], group.vectors[index]
            )
    return [subspaces[member] for member in range(len(subspaces))]
