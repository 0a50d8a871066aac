"""Pure maths of third-order tensors: mode-3 transforms and the tensor SVD. Tensors in, tensors out.

A stack is (layers, out, in). The mode-3 transform mixes layers with an orthogonal U (layers x slices):

    What_k = sum_l U[l, k] W_l        W_l = sum_k U[l, k] What_k

Each transformed slice has its own SVD; the tensor rank-R approximation keeps the R largest singular values over all
slices together (T-SVD: Kilmer and Martin 2011; with a data-driven U: ReFTA, CVPR 2026).

A stack is read in blocks of rows of all its layers (`Blocks`), so that nothing here needs it in memory as a whole;
functions say how many passes over the blocks they make.

The t-SVD is a block Krylov method (Musco and Musco 2015) on the operator What_k^T What_k, with all slices in one pass:
every step multiplies each slice's newest directions and orthogonalizes the result against the slice's basis; singular
values are read off the small projected matrix (Rayleigh-Ritz). Bases are float32, as the weights are; the projected
matrix and the components taken from the final subspaces are float64. With a `Metric` S the slices are What_k S^(1/2),
formed on the thin side only, and the right vectors come back through S^(-1/2).
"""

import math
from collections.abc import Callable, Iterable
from copy import copy
from typing import NamedTuple, Protocol

import scipy.fft
import torch
from torch import Tensor

from qrefta.choices import TRANSFORMS, Transform

Blocks = Callable[
    [], Iterable[tuple[slice, Tensor]]
]  # rows, and (layers or slices, rows, in) of them, in row order

_GRAM_CHUNK = 1 << 16  # columns of the mode-3 unfolding that are held in float64 at once
_OVERSAMPLING = 5  # directions of every slice beyond its share of the rank, at least
_SPARE = 16  # directions of every slice that are handed on beyond those kept
_WIDTH = 8  # products of so many columns, or a multiple, take the least time a column
_TOLERANCE = (
    2e-3  # share of the captured energy that the method's own, cautious estimate leaves to win
)
_FASTEST, _SLOWEST = 0.5, 0.9  # least and largest ratio of two gains that the estimate believes
_MOST_STEPS = 60
_EXACT_SHARE = (
    6  # a basis of this many blocks is no longer small next to the slice: decompose it exactly
)
_DEPENDENT = (
    1e-3  # part of a unit vector beside the ones before it that is too small to stand for it
)
_LEAST_SQUARE = 1e-28  # a sum of squares below it may lack some that float32 cannot hold
_ROUNDING = 1e-6  # of float32 products, relative to the largest


class Metric(Protocol):
    """A symmetric positive definite S on the input space, by its roots applied to (in, columns)."""

    def apply(self, vectors: Tensor) -> Tensor:
        """S^(1/2) vectors."""
        ...

    def apply_inverse(self, vectors: Tensor) -> Tensor:
        """S^(-1/2) vectors."""
        ...


class Slices(NamedTuple):
    """The transformed slices of a stack, as row blocks.

    Attributes:
        blocks: makes a pass: blocks of (slices, rows, in).
        shape: (slices, out, in).
        device: of the blocks.
        metric: None for the identity.
    """

    blocks: Blocks
    shape: tuple[int, int, int]
    device: torch.device
    metric: Metric | None = None


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
    """||matrix||_F^2, summed in float64 over float32 sums of rows; where those leave float32's range all in float64."""
    total = torch.linalg.vector_norm(matrix, dim=-1).double().square().sum().item()
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
    return gram


def transform_matrix(blocks: Blocks, layers: int, transform: Transform) -> Tensor:
    """Orthogonal mode-3 transform U of a stack, (layers, slices), float64; column k makes slice k.

    `lsm3`: left singular vectors of the mode-3 unfolding, strongest slice first, as eigenvectors of the small Gram
    matrix in float64 (they depend on the data and compact the energy best; one pass). `dct`: orthonormal DCT-II, no
    data needed. `identity`: no mixing; the t-SVD becomes an SVD of each layer under one rank budget.

    Raises:
        ValueError: for another transform.
    """
    if transform == "lsm3":
        vectors = torch.linalg.eigh(mode3_gram(blocks, layers)).eigenvectors.flip(1)
        return vectors * _signs(vectors, dim=0)
    if transform == "dct":
        rows = scipy.fft.dct(
            torch.eye(layers, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=0
        )
        return torch.from_numpy(rows).T.contiguous()
    if transform == "identity":
        return torch.eye(layers, dtype=torch.float64)
    raise ValueError(f"transform is {transform!r}; it must be one of {', '.join(TRANSFORMS)}")


def mix(block: Tensor, transform: Tensor) -> Tensor:
    """What_k = sum_l U[l, k] W_l for a block of rows of all layers (layers, rows, in), in its dtype."""
    if torch.equal(
        transform, torch.eye(len(transform), dtype=transform.dtype, device=transform.device)
    ):
        return block
    columns = transform.to(block.device, block.dtype)
    return (columns.T @ block.reshape(len(block), -1)).view(block.shape)


def t_svd_exact(slices: Slices, rank: int) -> TSVD:
    """The `rank` largest tensor singular values with their vectors, by an exact SVD of each slice in float64.

    Exactly `rank` components, whatever the slices' own ranks; ties go to the lower slice, then the lower index; the
    largest entry of every left vector is positive. The reference, and what small slices get. One pass; memory: the
    slices, in float64.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
    """
    return _strongest(_svd_of_slices(slices), rank, slices.metric)


def t_svd(slices: Slices, rank: int, seed: int) -> tuple[TSVD, list[Tensor]]:
    """The `rank` largest tensor singular values with their vectors, and each slice's right subspace.

    As `t_svd_exact`, up to less than 0.001 of the energy: a block Krylov method that stops when the
    captured energy, extrapolated from its last two gains, has no more than that share to win. A slice whose largest
    singular value, by its Ritz value and residual, is under the R-th largest found so far is left alone from then on;
    a slice that needs many more directions than the others gets wider blocks. So the work grows with R + slices, not
    with their product. Small slices, of which the basis would fill a large part, are decomposed exactly.

    The subspaces, (in, columns), orthonormal, float64, hold a few directions more than were kept: `refit` starts there.

    Passes: 5 to 15 as a rule. Memory beside a block: all slices' bases, (in, about 6 R + 50 slices) in float32.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
        seed: of the random start; drawn on the CPU, so it does not depend on the device.
    """
    count, out_features, in_features = slices.shape
    width = math.ceil((math.ceil(rank / count) + _OVERSAMPLING) / _WIDTH) * _WIDTH
    if _EXACT_SHARE * width >= min(out_features, in_features):
        parts = _svd_of_slices(slices)
        shares = _shares([part.values for part in parts], rank)
        starts = [
            part.right[:, : share + _SPARE] for part, share in zip(parts, shares, strict=True)
        ]
        return _strongest(parts, rank, slices.metric), starts
    groups = _grow(slices, rank, width, torch.Generator().manual_seed(seed))
    shares = _shares(_in_order(groups, "values"), rank)
    pairs = zip(_in_order(groups, "basis"), _in_order(groups, "vectors"), shares, strict=True)
    leading = [basis.double() @ vectors[:, : share + _SPARE] for basis, vectors, share in pairs]
    return refit(slices, rank, [torch.linalg.qr(columns).Q for columns in leading])


def refit(slices: Slices, rank: int, starts: list[Tensor]) -> tuple[TSVD, list[Tensor]]:
    """The best `rank` components within given right subspaces, and subspaces to start the next refit from. One pass.

    For slices that changed little since the subspaces were found, as between rounds of refinement. The subspaces handed
    on hold the components kept, so that the next refit cannot do worse than keep them, and What^T What times them, so
    that it can do better (a step of the block conjugate-gradient method without its memory).

    Args:
        slices: float32 or float64.
        rank: 1 .. columns of all subspaces.
        starts: for every slice, (in, columns), orthonormal, float64.
    """
    images, back = _multiply(slices, starts)
    squares, turns = [], []
    for image in images:
        values, vectors = torch.linalg.eigh(image.double().T @ image.double())
        squares.append(values.flip(0).clamp(min=0))
        turns.append(vectors.flip(1))
    parts, following = [], []
    for image, further, start, turn, share in zip(
        images, back, starts, turns, _shares(squares, rank), strict=True
    ):
        left, values, within = torch.linalg.svd(
            image.double() @ turn[:, :share], full_matrices=False
        )
        parts.append(_Part(left, values, start @ (turn[:, :share] @ within.T)))
        turn = turn[:, : share + _SPARE]
        kept, moved = start @ turn, further.double() @ turn
        pair = torch.cat([kept, moved - kept @ (kept.T @ moved)], dim=1)
        following.append(torch.linalg.qr(pair[:, : min(slices.shape[1:])]).Q)
    return _strongest(parts, rank, slices.metric), following


class _Part(NamedTuple):
    """Singular triplets of one slice, largest first: (out, n), (n,), (in, n), float64."""

    left: Tensor
    values: Tensor
    right: Tensor


class _Group:
    """Krylov bases of M = What^T What of slices that grow by blocks of one width, and their Rayleigh-Ritz values.

    Attributes:
        members: the n slices.
        basis: (n, in, columns), orthonormal.
        newest: (n, in, width), orthonormal to the basis; M has not been applied to them yet. Width 0: no longer grown.
        values: Ritz values, the squared singular values found so far, (n, columns), largest first; set by `solve`.
        vectors: theirs within the basis, (n, columns, columns).
        residual: ||M v - value v|| of the largest, (n,).
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor
    remainder: Tensor

    def __init__(self, slices: Slices, width: int, generator: torch.Generator) -> None:
        self.members = torch.arange(slices.shape[0])
        self.limit = min(slices.shape[1:])
        self.generator = generator
        self.basis = torch.empty(slices.shape[0], slices.shape[2], 0, device=slices.device)
        self.projected = torch.empty(
            slices.shape[0], 0, 0, dtype=torch.float64, device=slices.device
        )
        self.newest = torch.linalg.qr(self._random(width)).Q

    @property
    def size(self) -> int:
        return self.basis.shape[2]

    def part(self, chosen: Tensor) -> "_Group":
        """Some of the slices, by a mask (n,)."""
        found = copy(self)
        found.members = self.members[chosen.cpu()]
        for name in ("basis", "projected", "newest", "values", "vectors", "residual", "remainder"):
            setattr(found, name, getattr(self, name)[chosen])
        return found

    def absorb(self, images: Tensor) -> None:
        """Take in M newest."""
        old, more = self.size, images.shape[2]
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
        self.values, self.vectors = values.flip(1).clamp(min=0), vectors.flip(2)
        last = self.vectors[:, -self.remainder.shape[2] :, :1].to(self.remainder)
        self.residual = (self.remainder @ last).norm(dim=1)[:, 0]

    def extend(self, more: int = 0) -> None:
        """Next directions: the remainder's, and `more` random ones."""
        directions = self.remainder
        if more:
            directions = torch.cat([directions, self._random(more).to(directions)], dim=2)
        directions = directions[:, :, : self.limit - self.size]
        sizes = directions.norm(dim=1, keepdim=True)
        spent = sizes <= _ROUNDING * self.projected.abs().amax(dim=(1, 2), keepdim=True)
        if (
            spent.any()
        ):  # M keeps the basis in itself: nothing but rounding is left, so look elsewhere
            directions = torch.where(
                spent, self._random(directions.shape[2]).to(directions), directions
            )
            sizes = directions.norm(dim=1, keepdim=True)
        self.newest, triangles = torch.linalg.qr(self._beside(directions / sizes))
        if (
            triangles.diagonal(dim1=1, dim2=2).abs() < _DEPENDENT
        ).any():  # of parallel columns, QR makes any others
            self.newest = torch.linalg.qr(self._beside(self.newest)).Q

    def saturated(self, shares: Tensor) -> Tensor:
        """Whether the values kept take up so much of the basis that more may hide beside it, (n,)."""
        return (2 * shares > self.size) & (self.size < self.limit)

    def _beside(self, directions: Tensor) -> Tensor:
        """Directions without their part in the basis."""
        return directions - self.basis @ (self.basis.mT @ directions)

    def _random(self, columns: int) -> Tensor:
        drawn = torch.randn(len(self.basis), self.basis.shape[1], columns, generator=self.generator)
        return drawn.to(self.basis.device)


def _grow(slices: Slices, rank: int, width: int, generator: torch.Generator) -> list[_Group]:
    """Grow bases for the slices that matter until the captured energy has no more than `_TOLERANCE` to win.

    Values are looked at after every second step: a large basis takes as long to solve as to multiply.
    """
    groups = [_Group(slices, width, generator)]
    captured = last_gain = 0.0
    for step in range(_MOST_STEPS):
        growing = [group for group in groups if group.newest.shape[2]]
        if not growing:
            break
        _, images = _multiply(slices, _in_order(groups, "newest"))
        for group in growing:
            group.absorb(torch.stack([images[member] for member in group.members]))
        if step % 2 == 0 and all(group.size < group.limit for group in growing):
            for group in growing:
                group.extend()
            continue
        for group in growing:
            group.solve()
        best = torch.cat([group.values.flatten() for group in groups]).topk(rank).values
        gain = best.sum().item() - captured
        captured += gain
        least = best[-1].clamp(min=_ROUNDING * best[0])
        saturated = [group.saturated((group.values > least).sum(dim=1)) for group in groups]
        slowdown = min(max(gain / last_gain, _FASTEST), _SLOWEST) if last_gain > 0 else _SLOWEST
        to_win = gain * slowdown / (1 - slowdown)
        if to_win <= _TOLERANCE * captured and not any(full.any() for full in saturated):
            break
        last_gain = gain
        groups = [
            part
            for group, full in zip(groups, saturated, strict=True)
            for part in _next(group, best[-1], full)
        ]
    return groups


def _next(group: _Group, threshold: Tensor, saturated: Tensor) -> list[_Group]:
    """The slices of a group by what comes next: left alone, grown by a block, or by as much as there is already."""
    alone = group.values[:, 0] + group.residual < threshold
    parts = []
    for chosen, more in ((alone, None), (~alone & ~saturated, 0), (~alone & saturated, group.size)):
        if chosen.any():
            part = group if chosen.all() else group.part(chosen)
            if more is not None:
                part.extend(more)
            parts.append(part)
    return parts


def _in_order(groups: list[_Group], name: str) -> list[Tensor]:
    """An attribute of all slices, in the order of the slices."""
    found = {
        member: value
        for group in groups
        for member, value in zip(group.members.tolist(), getattr(group, name), strict=True)
    }
    return [found[member] for member in range(len(found))]


def _multiply(slices: Slices, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What_k S^(1/2) v and S^(1/2) What_k^T What_k S^(1/2) v of the vectors of every slice. One pass."""
    metric, images = slices.metric, []
    same_width = len({v.shape[1] for v in vectors}) == 1
    for rows, block in slices.blocks():
        if not images:
            thin = [(v if metric is None else metric.apply(v)).to(block.dtype) for v in vectors]
            if same_width:  # all slices in one call: a fifth faster
                thin = [torch.stack(thin)]
            images = [block.new_empty(*v.shape[:-2], slices.shape[1], v.shape[-1]) for v in thin]
            sums = [torch.zeros_like(v.mT, memory_format=torch.contiguous_format) for v in thin]
        for part, columns, image, total in zip(
            [block] if same_width else block, thin, images, sums, strict=True
        ):
            if columns.shape[-1]:
                product = torch.matmul(part, columns)
                image[..., rows, :] = product
                total += product.mT @ part
    if same_width:
        images, sums = list(images[0]), list(sums[0])
    return images, [columns.T if metric is None else metric.apply(columns.T) for columns in sums]


def _svd_of_slices(slices: Slices) -> list[_Part]:
    """All singular triplets of every slice."""
    parts = []
    for matrix in torch.cat([block for _, block in slices.blocks()], dim=1):
        weighted = (
            matrix.double() if slices.metric is None else slices.metric.apply(matrix.double().T).T
        )
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        parts.append(_Part(left, values, right.T))
    return parts


def _strongest(parts: list[_Part], rank: int, metric: Metric | None) -> TSVD:
    """The `rank` largest components of all slices; a tie goes to the lower slice, then the lower index."""
    values = torch.cat([part.values for part in parts])
    slices = torch.cat(
        [torch.full_like(part.values, index) for index, part in enumerate(parts)]
    ).long()
    order = values.argsort(descending=True, stable=True)[:rank]
    left = torch.cat([part.left for part in parts], dim=1)[:, order]
    right = torch.cat([part.right for part in parts], dim=1)[:, order]
    signs = _signs(left, dim=0)
    right = (right if metric is None else metric.apply_inverse(right)) * signs
    return TSVD(left * signs, values[order], right.T, slices[order])


def _shares(values: list[Tensor], rank: int) -> list[int]:
    """How many of the `rank` largest values belong to each slice."""
    slices = torch.cat([torch.full_like(own, index) for index, own in enumerate(values)]).long()
    order = torch.cat(values).argsort(descending=True, stable=True)[:rank]
    return torch.bincount(slices[order], minlength=len(values)).tolist()


def _signs(vectors: Tensor, dim: int) -> Tensor:
    """+1 or -1 that makes the entry of largest magnitude positive along `dim` (kept as size 1)."""
    peak = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)
