"""TeRA: an update of high rank with as few trainable parameters as vectors have.

arXiv 2509.03234, ACL 2026, Gu, Zhou, Iacovides, Mandic.

From the paper: the update, reshaped to a higher-order tensor, is a Tucker-like network. Its large
random core and factors are frozen and shared by all layers; diagonals, vectors that belong to a
layer, train. Ours, where the text does not say it: two modes a side, with the sizes of
`mode_sizes`; the core is a Kronecker product too, so nothing large is ever made; a vector is its
start plus trainable parameters, so that bf16 rounds a change and not a 1; the vectors of the first
output mode start at 0, all others at 1.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qrefta.nn.factors import Factors, frozen
from qrefta.nn.first_order import first_order
from qrefta.nn.product import frozen_product
from qrefta.nn.quantized import FrozenWeight

_ALL_ROWS = slice(None)
# Tokens whose outer products are made at once: three times as fast as one contraction over all.
_CHUNK = 512


class TeRA(Factors):
    """Delta_l = F_out diag(a_l) G diag(b_l) F_in^T.

    Each of them is a Kronecker product of two small matrices or vectors. So Delta_l = D_1 (x) D_2
    with D_i = F_out,i diag(a_l,i) G_i diag(b_l,i) F_in,i^T, cut to (out, in). Its rank is the
    product of the ranks of D_1 and D_2: r^2 while r is at most the modes' sizes. A stack trains
    4 K r parameters.

    Args: see `Factors`; `rank` is r, the inner size of every mode, at most 4 times the largest
        mode.

    Attributes:
        scales: (layers, 4, r), of a_1, a_2, b_1, b_2, minus their starts.
        sizes: (outputs, inputs) of D_1 and D_2.
        mode_1, mode_2: (rows of F_out,i, G_i and F_in,i, r), frozen, drawn once and saved.
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self.inner_rank = rank
        self.scales = nn.Parameter(torch.zeros(layers, 4, rank, dtype=self.master_dtype))
        self.sizes = list(zip(mode_sizes(out_features), mode_sizes(in_features), strict=True))
        rows = [outputs + rank + inputs for outputs, inputs in self.sizes]
        self.mode_1 = frozen(torch.empty(rows[0], rank, dtype=self.master_dtype))
        self.mode_2 = frozen(torch.empty(rows[1], rank, dtype=self.master_dtype))

    def draw(self, generator: torch.Generator) -> None:
        rank = self.inner_rank
        for mode, (_, inputs) in zip((self.mode_1, self.mode_2), self.sizes, strict=True):
            # So D_i keeps the length of a vector, times root(out / in), as the start of a dense
            # layer does.
            drawn = torch.randn(mode.shape, generator=generator, dtype=torch.float64)
            drawn /= math.sqrt(rank)
            drawn[-inputs:] *= math.sqrt(rank / inputs)
            mode.copy_(drawn.to(self.dtype))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return 4 * max(*mode_sizes(out_features), *mode_sizes(in_features))

    def matrices(self, layer: int) -> tuple[Tensor, Tensor]:
        """D_1 and D_2 of a layer, differentiable in `scales`."""
        a_1, a_2, b_1, b_2 = self.rounded(self.scales[layer])
        first = self._matrix(self.mode_1, self.sizes[0], a_1, 1 + b_1)
        second = self._matrix(self.mode_2, self.sizes[1], 1 + a_2, 1 + b_2)
        return first, second

    def _matrix(self, mode: Tensor, sizes: tuple[int, int], a: Tensor, b: Tensor) -> Tensor:
        outputs, inputs = sizes
        outer, core, inner = mode.split([outputs, self.inner_rank, inputs])
        return (outer * a) @ (core * b) @ inner.T

    def product(self, x: Tensor, layer: int, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        with self._without_autocast():
            first, second = self.matrices(layer)
        update = kronecker_product(x, first.to(x), second.to(x), self.out_features)
        # After the update, so that gradient checkpointing does not compute it again in vain.
        return frozen_product(x, bias, weight) + update

    @torch.no_grad()
    def delta(self, layer: int, rows: slice = _ALL_ROWS) -> Tensor:
        first, second = (matrix.to(torch.float32) for matrix in self.matrices(layer))
        height = len(second)
        start, stop, _ = rows.indices(self.out_features)
        # Only the rows of D_1 that the asked rows come from.
        block = first[start // height : -(-stop // height)]
        dense = torch.kron(block, second)[start % height :]
        return dense[: stop - start, : self.in_features]

    def trained(self) -> list[nn.Parameter]:
        return [self.scales]


def mode_sizes(features: int) -> tuple[int, int]:
    """Two sizes, as even as possible, whose product is `features` or a little more.

    With no divisor between half the root and the root, as for a prime, the sizes are the root and
    the size that then is needed, both rounded up; the update is cut to `features`.
    """
    root = math.isqrt(features)
    for size in range(root, root // 2, -1):
        if features % size == 0:
            return size, features // size
    size = math.ceil(math.sqrt(features))
    return size, -(-features // size)


def kronecker_product(x: Tensor, first: Tensor, second: Tensor, out_features: int) -> Tensor:
    """The product x (first (x) second)^T, cut to `out_features`; only x is kept for gradients.

    Args:
        x: (..., in), at most as wide as the Kronecker product; missing columns count as 0.
        first, second: (o_1, i_1) and (o_2, i_2), in the dtype of x.
    """
    return _KroneckerProduct.apply(x, first, second, out_features)


class _KroneckerProduct(torch.autograd.Function):
    """Y = first X second^T, for every token as a matrix X (i_1, i_2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x, first, second)
        grid = _folded(x, first.shape[1], second.shape[1])
        y = first @ _second_mode(grid, second.T)
        y = y.flatten(-2)[:, :out_features]
        return y.reshape(*x.shape[:-1], out_features)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # compute in the gradient's dtype
            return *_kronecker_gradients(ctx, grad), None


def _kronecker_gradients(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and both matrices."""
    x, first, second = ctx.saved_tensors
    need_x, need_first, need_second = ctx.needs_input_grad[:3]
    grad_y = _folded(grad, len(first), len(second))
    grid = _folded(x, first.shape[1], second.shape[1]).to(grad)
    back = first.T @ grad_y  # (tokens, i_1, o_2)
    grad_x = grad_first = grad_second = None
    if need_x:
        rows = _second_mode(back, second).flatten(-2)
        grad_x = rows[:, : x.shape[-1]].reshape(x.shape)
    if need_first:
        images = _second_mode(grid, second.T)
        grad_first = torch.zeros_like(first, dtype=grad.dtype)
        for left, right in zip(grad_y.split(_CHUNK), images.split(_CHUNK), strict=True):
            grad_first += (left @ right.mT).sum(0)
    if need_second:
        grad_second = back.flatten(0, 1).T @ grid.flatten(0, 1)
    return grad_x, grad_first, grad_second


def _folded(rows: Tensor, first: int, second: int) -> Tensor:
    """Rows (..., n) as (tokens, first, second), padded with zeros."""
    flat = rows.reshape(-1, rows.shape[-1])
    padded = nn.functional.pad(flat, (0, first * second - flat.shape[1]))
    return padded.view(-1, first, second)


def _second_mode(grid: Tensor, matrix: Tensor) -> Tensor:
    """The product grid @ matrix of every token, (tokens, i, j) -> (tokens, i, o), in one call."""
    return (grid.flatten(0, 1) @ matrix).view(*grid.shape[:2], -1)
