"""Pure maths of third-order tensors: mode-3 transforms and the tensor SVD. Tensors in, tensors out.

A stack is (layers, out, in). The mode-3 transform mixes layers with an orthogonal U (layers x slices):

    What_k = sum_l U[l, k] W_l        W_l = sum_k U[l, k] What_k

Each transformed slice has its own SVD; the tensor rank-R approximation keeps the R largest singular values over all
slices together (T-SVD: Kilmer and Martin 2011; with a data-driven U: ReFTA, CVPR 2026).

A stack is read in blocks of rows of all its layers (`Blocks`), so that nothing here needs it in memory as a whole;
functions say how many passes over the blocks they make.

The t-SVD is a block Krylov method (Musco and Musco 2015) on the operator What_k^T What_k, with all slices in one pass:
every step multiplies each slice's newest directions, orthogonalizes the result against the slice's basis, and reads
the singular values off the small projected matrix (Rayleigh-Ritz, in float64). With a `Metric` S the slices are
What_k S^(1/2), formed on the thin side only, and the right vectors come back through S^(-1/2).
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, get_args

import scipy.fft
import torch
from torch import Tensor

Transform = Literal["lsm3", "dct", "identity"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)

Blocks = Callable[[], Iterable[tuple[slice, Tensor]]]  # rows, and (layers or slices, rows, in) of them, in row order

_GRAM_CHUNK = 1 << 16  # columns of the mode-3 unfolding that are held in float64 at once
_OVERSAMPLING = 6  # directions of every slice beyond its share of the rank
_TOLERANCE = 4e-4  # share of the captured energy that the method may leave behind, by its own estimate
_SLOWEST = 0.9  # largest ratio of two gains that the estimate believes
_LEAST_STEPS, _MOST_STEPS = 3, 60
_EXACT_SHARE = 6  # a basis of this many blocks is no longer small next to the slice: decompose it exactly
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
        rows = scipy.fft.dct(torch.eye(layers, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=0)
        return torch.from_numpy(rows).T.contiguous()
    if transform == "identity":
        return torch.eye(layers, dtype=torch.float64)
    raise ValueError(f"transform is {transform!r}; it must be one of {', '.join(TRANSFORMS)}")


def mix(block: Tensor, transform: Tensor) -> Tensor:
    """What_k = sum_l U[l, k] W_l for a block of rows of all layers (layers, rows, in), in its dtype."""
    if torch.equal(transform, torch.eye(len(transform), dtype=transform.dtype, device=transform.device)):
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

    As `t_svd_exact`, up to a share of about `_TOLERANCE` of the energy: a block Krylov method that stops when the
    captured energy, extrapolated from its last two gains, has no more than that share to win. A slice whose largest
    singular value, by its Ritz value and residual, is under the R-th largest found so far is left alone from then on;
    a slice that needs many more directions than the others gets wider blocks. So the work grows with R + slices, not
    with their product. Small slices, of which the basis would fill a large part, are decomposed exactly.

    The subspaces, (in, columns), orthonormal, float64, hold a few directions more than were kept: `refit` starts there.

    Passes: 5 to 12 as a rule. Memory beside a block: all slices' bases, (in, about 4 R + 30 slices) in float64.

    Args:
        slices: float32 or float64.
        rank: 1 .. slices * min(out, in).
        seed: of the random start; drawn on the CPU, so it does not depend on the device.
    """
    count, out_features, in_features = slices.shape
    width = -(-rank // count) + _OVERSAMPLING
    if _EXACT_SHARE * width >= min(out_features, in_features):
        parts = _svd_of_slices(slices)
        shares = _shares([part.values for part in parts], rank)
        starts = [part.right[:, : share + _OVERSAMPLING] for part, share in zip(parts, shares, strict=True)]
        return _strongest(parts, rank, slices.metric), starts
    generator = torch.Generator().manual_seed(seed)
    bases = [_Basis(slices.shape[1:], width, slices.device, generator) for _ in range(count)]
    _grow(slices, bases, rank)
    shares = _shares([basis.values for basis in bases], rank)
    return refit(slices, rank, [basis.leading(n + _OVERSAMPLING) for basis, n in zip(bases, shares, strict=True)])


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
    parts, turns = [], []
    for image, start in zip(images, starts, strict=True):
        left, values, turn = torch.linalg.svd(image.double(), full_matrices=False)
        turns.append(turn.T)
        parts.append(_Part(left, values, start @ turn.T))
    shares = _shares([part.values for part in parts], rank)
    following = []
    for part, turn, image, share in zip(parts, turns, back, shares, strict=True):
        kept = part.right[:, : share + _OVERSAMPLING]
        moved = image @ turn[:, : kept.shape[1]]
        pair = torch.cat([kept, moved - kept @ (kept.T @ moved)], dim=1)
        following.append(torch.linalg.qr(pair[:, : min(slices.shape[1:])]).Q)
    return _strongest(parts, rank, slices.metric), following


class _Part(NamedTuple):
    """Singular triplets of one slice, largest first: (out, n), (n,), (in, n), float64."""

    left: Tensor
    values: Tensor
    right: Tensor


class _Basis:
    """The Krylov basis of one slice's M = What^T What, and its Rayleigh-Ritz values.

    Attributes:
        newest: (in, columns), orthonormal to the rest of the basis; M has not been applied to them yet.
        values: Ritz values, the squared singular values found so far, largest first.
        residuals: ||M v - value v|| of each.
    """

    def __init__(self, shape: tuple[int, int], width: int, device: torch.device, generator: torch.Generator) -> None:
        self.limit = min(shape)
        self.generator = generator
        self.basis = torch.empty(shape[1], 0, dtype=torch.float64, device=device)
        self.projected = torch.empty(0, 0, dtype=torch.float64, device=device)
        self.newest = torch.linalg.qr(self._random(width)).Q

    @property
    def size(self) -> int:
        return self.basis.shape[1]

    def absorb(self, image: Tensor) -> None:
        """Take in M newest."""
        old = self.size
        self.basis = torch.cat([self.basis, self.newest], dim=1)
        coupling = self.basis.T @ image
        grown = torch.nn.functional.pad(self.projected, (0, image.shape[1], 0, image.shape[1]))
        grown[old:] = coupling.T
        grown[:, old:] = coupling
        self.projected = (grown + grown.T) / 2
        values, vectors = torch.linalg.eigh(self.projected)
        self.values, self.vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        self.remainder = image - self.basis @ coupling
        self.residuals = (self.remainder @ self.vectors[old:]).norm(dim=0)
        self.newest = self.newest[:, :0]

    def extend(self, share: int) -> None:
        """Next directions: the remainder's, and random ones where the `share` values kept fill the basis."""
        left, sizes, _ = torch.linalg.svd(self.remainder, full_matrices=False)
        directions = left[:, sizes > _ROUNDING * self.values[0]]
        if self.saturated(share):
            directions = torch.cat([directions, self._random(self.size)], dim=1)
        directions = directions[:, : self.limit - self.size]
        self.newest = torch.linalg.qr(self._beside(directions)).Q

    def saturated(self, share: int) -> bool:
        """Whether the values kept take up so much of the basis that more may hide beside it."""
        return 2 * share > self.size and self.size < self.limit

    def leading(self, columns: int) -> Tensor:
        """Ritz vectors of the largest values, (in, columns), orthonormal."""
        return torch.linalg.qr(self.basis @ self.vectors[:, :columns]).Q

    def _random(self, columns: int) -> Tensor:
        shape = (self.basis.shape[0], columns)
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.basis.device)

    def _beside(self, directions: Tensor) -> Tensor:
        """Directions without their part in the basis."""
        return directions - self.basis @ (self.basis.T @ directions)


def _grow(slices: Slices, bases: list[_Basis], rank: int) -> None:
    """Grow the bases of the slices that matter until the captured energy has no more than `_TOLERANCE` to win."""
    captured = last_gain = 0.0
    for step in range(_MOST_STEPS):
        _, images = _multiply(slices, [basis.newest for basis in bases])
        for basis, image in zip(bases, images, strict=True):
            if basis.newest.shape[1]:
                basis.absorb(image)
        values = [basis.values for basis in bases]
        best = torch.cat(values).topk(rank).values
        threshold, gain = best[-1], best.sum().item() - captured
        captured += gain
        shares = [int((own > max(threshold.item(), _ROUNDING * best[0].item())).sum()) for own in values]
        slowdown = min(gain / last_gain, _SLOWEST) if last_gain > 0 else _SLOWEST
        to_win = gain * slowdown / (1 - slowdown)
        searching = any(basis.saturated(share) for basis, share in zip(bases, shares, strict=True))
        if step + 1 >= _LEAST_STEPS and to_win <= _TOLERANCE * captured and not searching:
            return
        last_gain = gain
        for basis, share in zip(bases, shares, strict=True):
            if basis.values[0] + basis.residuals[0] >= threshold:
                basis.extend(share)
        if not any(basis.newest.shape[1] for basis in bases):
            return


def _multiply(slices: Slices, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What_k S^(1/2) v and S^(1/2) What_k^T What_k S^(1/2) v of the vectors of every slice, float64. One pass."""
    metric, dtype = slices.metric, None
    for rows, block in slices.blocks():
        if dtype is None:
            dtype = block.dtype
            thin = [(v if metric is None else metric.apply(v)).to(dtype) for v in vectors]
            images = [block.new_empty(slices.shape[1], v.shape[1]) for v in vectors]
            sums = [torch.zeros_like(v) for v in thin]
        for index, columns in enumerate(thin):
            if columns.shape[1]:
                product = torch.matmul(block[index], columns, out=images[index][rows])
                sums[index].addmm_(block[index].T, product)
    sums = [columns.double() for columns in sums]
    return images, sums if metric is None else [metric.apply(columns) for columns in sums]


def _svd_of_slices(slices: Slices) -> list[_Part]:
    """All singular triplets of every slice."""
    parts = []
    for matrix in torch.cat([block for _, block in slices.blocks()], dim=1):
        weighted = matrix.double() if slices.metric is None else slices.metric.apply(matrix.double().T).T
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        parts.append(_Part(left, values, right.T))
    return parts


def _strongest(parts: list[_Part], rank: int, metric: Metric | None) -> TSVD:
    """The `rank` largest components of all slices; a tie goes to the lower slice, then the lower index."""
    values = torch.cat([part.values for part in parts])
    slices = torch.cat([torch.full_like(part.values, index) for index, part in enumerate(parts)]).long()
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
