"""TeRA: a high-rank update with as few trained numbers as vectors (arXiv 2509.03234, ACL 2026, Gu, Zhou, Iacovides,
Mandic).

From the paper: the update, tensorized, is a Tucker-like network whose large random core and factors are frozen and
shared by all layers; the diagonals, vectors that belong to a layer, train. Ours, where its text could not be read: two
modes a side, sized as `mode_sizes` says; the core is a Kronecker product too, so nothing large is ever made; a vector
is its start plus the trained numbers, so that bf16 rounds a change and not a 1; the first output mode's vectors start
at 0, all others at 1.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qrefta.nn.factors import Factors, Rank, frozen
from qrefta.nn.product import frozen_product
from qrefta.nn.quantized import FrozenWeight

_ALL = slice(None)
_CHUNK = 512  # tokens whose outer products are there at once: three times as fast as one contraction over all


class TeRA(Factors):
    """Delta_l = F_out diag(a_l) G diag(b_l) F_in^T, each a Kronecker product of two small matrices or vectors.

    So Delta_l = D_1 (x) D_2 with D_i = F_out,i diag(a_l,i) G_i diag(b_l,i) F_in,i^T, cut to (out, in). Its rank is that
    of D_1 times that of D_2: r^2 while r is at most the modes' sizes. A stack trains 4 K r numbers.

    Args: see `Factors`; `rank` is r, the inner size of every mode, at most 4 times the largest mode.

    Attributes:
        scales: (layers, 4, r): of a_1, a_2, b_1, b_2, less their starts.
        mode_1, mode_2: (rows of F_out,i, G_i and F_in,i, r), frozen, drawn once and saved.
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        master = torch.promote_types(dtype, torch.float32)
        self.scales = nn.Parameter(torch.zeros(layers, 4, rank, dtype=master))
        self.sizes = list(zip(mode_sizes(out_features), mode_sizes(in_features), strict=True))
        for index, (out, into) in enumerate(self.sizes, start=1):
            self.register_parameter(
                f"mode_{index}", frozen(torch.empty(out + rank + into, rank, dtype=master))
            )

    def draw(self, generator: torch.Generator) -> None:
        for mode, (_, into) in zip((self.mode_1, self.mode_2), self.sizes, strict=True):
            # D_i then keeps the length of a vector, times root (out / in), as a dense layer's start does
            drawn = torch.randn(mode.shape, generator=generator, dtype=torch.float64) / math.sqrt(
                self.rank
            )
            drawn[-into:] *= math.sqrt(self.rank / into)
            mode.copy_(drawn.to(self.dtype))

    @classmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        return 4 * max(*mode_sizes(out_features), *mode_sizes(in_features))

    def matrices(self, layer: int) -> tuple[Tensor, Tensor]:
        """D_1 and D_2 of a layer, differentiable in `scales`."""
        a_1, a_2, b_1, b_2 = self._seen(self.scales[layer])
        first = self._matrix(self.mode_1, self.sizes[0], a_1, 1 + b_1)
        return first, self._matrix(self.mode_2, self.sizes[1], 1 + a_2, 1 + b_2)

    def _matrix(self, mode: Tensor, sizes: tuple[int, int], a: Tensor, b: Tensor) -> Tensor:
        outer, core, inner = mode.split([sizes[0], self.rank, sizes[1]])
        return (outer * a) @ (core * b) @ inner.T

    def product(self, x: Tensor, layer: int, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        product = frozen_product(x, bias, weight)
        with self._own_precision():
            first, second = self.matrices(layer)
        return product + kronecker_product(x, first.to(x), second.to(x), self.out_features)

    @torch.no_grad()
    def delta(self, layer: int, rows: slice = _ALL) -> Tensor:
        first, second = (matrix.to(torch.float32) for matrix in self.matrices(layer))
        inner = len(second)
        start, stop, _ = rows.indices(self.out_features)
        block = first[start // inner : -(-stop // inner)]
        dense = torch.kron(block, second)[start % inner :]
        return dense[: stop - start, : self.in_features]

    def trained(self) -> list[nn.Parameter]:
        return [self.scales]


def mode_sizes(features: int) -> tuple[int, int]:
    """Two sizes whose product is `features`, as even as its divisors allow, or a little more where they allow none.

    With no divisor between half the root and the root, as for a prime, the sizes are the root and what is needed beside
    it, both rounded up; the update is then cut to `features`.
    """
    root = math.isqrt(features)
    for size in range(root, root // 2, -1):
        if features % size == 0:
            return size, features // size
    size = math.ceil(math.sqrt(features))
    return size, -(-features // size)


def kronecker_product(x: Tensor, first: Tensor, second: Tensor, out_features: int) -> Tensor:
    """The product of x (..., in) with (first (x) second)^T, cut to `out_features`; x alone is kept for gradients.

    Args:
        x: its width is at most the Kronecker product's; what lacks counts as 0.
        first, second: (o_1, i_1) and (o_2, i_2), in x's dtype.
    """
    return _KroneckerProduct.apply(x, first, second, out_features)


class _KroneckerProduct(torch.autograd.Function):
    """With tokens X (i_1, i_2): Y = first X second^T."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, first: Tensor, second: Tensor, out_features: int
    ) -> Tensor:
        ctx.save_for_backward(x, first, second)
        grid = _folded(x, first.shape[1], second.shape[1])
        y = first @ _second_mode(grid, second.T)
        return y.flatten(-2)[:, :out_features].reshape(*x.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        need_x, need_first, need_second = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            grad_y = _folded(grad, len(first), len(second))
            grid = _folded(x, first.shape[1], second.shape[1]).to(grad)
            back = first.T @ grad_y  # (tokens, i_1, o_2)
            grad_x = grad_first = grad_second = None
            if need_x:
                grad_x = _second_mode(back, second).flatten(-2)[:, : x.shape[-1]].reshape(x.shape)
            if need_first:
                pairs = zip(
                    grad_y.split(_CHUNK), _second_mode(grid, second.T).split(_CHUNK), strict=True
                )
                grad_first = sum((ours @ theirs.mT).sum(0) for ours, theirs in pairs)
            if need_second:
                grad_second = back.flatten(0, 1).T @ grid.flatten(0, 1)
        return grad_x, grad_first, grad_second, None


def _folded(rows: Tensor, first: int, second: int) -> Tensor:
    """Rows (..., n) as (tokens, first, second), with zeros where n is less."""
    flat = rows.reshape(-1, rows.shape[-1])
    return nn.functional.pad(flat, (0, first * second - flat.shape[1])).view(-1, first, second)


def _second_mode(grid: Tensor, matrix: Tensor) -> Tensor:
    """The product grid @ matrix of every token, (tokens, i, j) -> (tokens, i, o), in one call."""
    return (grid.flatten(0, 1) @ matrix).view(*grid.shape[:2], -1)
