"""The product of tokens with an adapted weight, as one autograd function, and what it costs.

    y = x dequant(Q)^T + ((x down^T) core^T) up^T + bias

A core is a matrix, or a vector that stands for a diagonal one. With T tokens and factors of width R, the six products
with a factor in a training step are, for a diagonal core

    forward     h = x down^T                        2 T in R operations
                y += (h * core) up^T                2 T out R      or   W += (up * core) down     2 in out R
    backward    back = (g up) * core                2 T out R
                dx += back down                     2 T in R       or   W += (up * core) down     2 in out R
                dup = g^T (h * core)                2 T out R
                ddown = back^T x                    2 T in R

Where there are more tokens than inputs (forward) or outputs (backward) the second form is cheaper: the update is added
into the buffer that the 4-bit weight was dequantized to anyway. It is no rebuilding of the weight: it happens outside
autograd, so there is no gradient of a dense weight and nothing dense is kept. Without gradients of the factors, as in
evaluation, it spares h too, and pays from in out / (in + out) tokens on. Operations and bytes change sides at the same
number of tokens, so one comparison of counts decides; what it leaves out is that bitsandbytes' fused kernels, which the
first form uses for few tokens on CUDA, need no dequantized buffer.

Kept for the backward pass: x, and in the first form h, each only if a gradient needs it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qrefta.nn.quantized import Packed, QuantFormat, dequantize, linear


class Cost(NamedTuple):
    """What a computation costs.

    Attributes:
        operations: floating-point multiplications and additions.
        moved_bytes: read and written, each operand of each product counted once.
    """

    operations: int
    moved_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.moved_bytes + other.moved_bytes)


def step_cost(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    value_bytes: int = 2,
    weight_bits: float = 4.5,
) -> Cost:
    """Forward and backward pass of one adapted linear whose input and factors take gradients.

    Args:
        tokens: T.
        in_features, out_features: of the weight.
        rank: R; 0 is the frozen linear alone.
        value_bytes: of an activation and of a dequantized weight.
        weight_bits: stored, for one weight; 4.5 is NF4 with a float32 scale for 64.
    """

    def product(rows: int, inner: int, columns: int, accumulated: bool = False) -> Cost:
        """(rows x inner) times (inner x columns), added to what is there if `accumulated`."""
        values = rows * inner + inner * columns + (2 if accumulated else 1) * rows * columns
        return Cost(2 * rows * inner * columns, value_bytes * values)

    size = in_features * out_features
    dequantizing = Cost(0, size * (weight_bits / 8 + value_bytes))
    frozen = [
        dequantizing,
        product(tokens, in_features, out_features),
        dequantizing,
        product(tokens, out_features, in_features),
    ]
    if rank == 0:
        return sum(frozen, Cost(0, 0))
    merged = product(out_features, rank, in_features, accumulated=True)
    adapter = [
        product(tokens, in_features, rank),
        merged
        if _merges(tokens, in_features, out_features, True)
        else product(tokens, rank, out_features, accumulated=True),
        product(tokens, out_features, rank),
        merged
        if _merges(tokens, out_features, in_features, True)
        else product(tokens, rank, in_features, accumulated=True),
        product(rank, tokens, out_features),
        product(rank, tokens, in_features),
    ]
    return sum(frozen + adapter, Cost(0, 0))


def _merges(tokens: int, contracted: int, produced: int, gradients: bool) -> bool:
    """Whether adding the update to the dequantized weight is cheaper than adding it to the product with that weight.

    Args:
        tokens: rows of the product.
        contracted, produced: features that go in and come out.
        gradients: whether the rank-wide product is needed for gradients, whichever form runs.
    """
    return tokens * (produced + (0 if gradients else contracted)) > contracted * produced


def adapted_product(
    x: Tensor,
    up: Tensor | None,
    core: Tensor | None,
    down: Tensor | None,
    bias: Tensor | None,
    packed: Packed,
    fmt: QuantFormat | None,
    shape: tuple[int, int],
    rounding: torch.dtype | None,
) -> Tensor:
    """The product x W^T + ((x down^T) core^T) up^T + bias, differentiable in x, up, core, down and bias.

    Args:
        x: (..., in).
        up, core, down: (out, R), (R, S) or the diagonal (R,), and (S, in), or three None for a frozen linear. They may
            be on another device than x: they are moved after they are rounded, and no copy of them is kept.
        bias: (out,) or None.
        packed, fmt, shape: the frozen weight, its format (None: 16 bits) and its shape (out, in).
        rounding: dtype that up and down are rounded to.
    """
    if torch.is_grad_enabled():
        return _AdaptedProduct.apply(x, up, core, down, bias, *packed, fmt, shape, rounding)
    y, _ = _forward(x, up, core, down, bias, packed, fmt, shape, rounding, gradients=False)
    return y.view(*x.shape[:-1], shape[0])


class _AdaptedProduct(torch.autograd.Function):
    """`adapted_product` and its gradients.

    With g the gradient of y and h = x down^T:
        dx = g W + (g up core) down        dup = g^T (h core^T)
        ddown = (g up core)^T x            dcore = (g up)^T h, or its diagonal
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        up: Tensor | None,
        core: Tensor | None,
        down: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        absmax: Tensor | None,
        absmax_state: Tensor | None,
        fmt: QuantFormat | None,
        shape: tuple[int, int],
        rounding: torch.dtype | None,
    ) -> Tensor:
        _, need_up, need_core, need_down, _ = ctx.needs_input_grad[:5]
        packed = Packed(weight, absmax, absmax_state)
        gradients = need_up or need_core or need_down
        y, narrow = _forward(x, up, core, down, bias, packed, fmt, shape, rounding, gradients)
        if narrow is None and gradients and not need_down:  # then x need not be kept for it
            narrow = x.reshape(-1, shape[1]) @ rounded_factor(down, rounding, x).T
        ctx.fmt, ctx.shape, ctx.rounding, ctx.x_shape = fmt, shape, rounding, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = (
            x.reshape(-1, shape[1]) if need_down else None,
            narrow if need_up or need_core else None,
        )
        ctx.save_for_backward(*kept, up, core, down, weight, absmax, absmax_state)
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # all is in the gradient's dtype
            return _gradients(ctx, grad)


def _forward(
    x: Tensor,
    up: Tensor | None,
    core: Tensor | None,
    down: Tensor | None,
    bias: Tensor | None,
    packed: Packed,
    fmt: QuantFormat | None,
    shape: tuple[int, int],
    rounding: torch.dtype | None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """The product, (tokens, out), and x down^T if it was made."""
    tokens, offset = x.reshape(-1, shape[1]), None if bias is None else bias.to(x.dtype)
    if up is None:
        return _frozen_product(tokens, packed, fmt, shape, offset), None
    wide_up, wide_down, core = (
        rounded_factor(up, rounding, x),
        rounded_factor(down, rounding, x),
        core.to(x),
    )
    if _merges(len(tokens), shape[1], shape[0], gradients):
        merged = _merged(packed, fmt, shape, _times(wide_up, core), wide_down)
        return nn.functional.linear(tokens, merged, offset), None
    narrow = tokens @ wide_down.T
    y = _frozen_product(tokens, packed, fmt, shape, offset)
    return y.addmm_(_times(narrow, core, transposed=True), wide_up.T), narrow


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, narrow, up, core, down, weight, absmax, absmax_state = ctx.saved_tensors
    need_x, need_up, need_core, need_down, need_bias = ctx.needs_input_grad[:5]
    packed = Packed(weight, absmax, absmax_state)
    grad = grad.reshape(-1, ctx.shape[0])
    grad_x = grad_up = grad_core = grad_down = None
    if up is None:
        if need_x:
            grad_x = grad @ residual(packed, ctx.fmt, ctx.shape, grad.dtype)
    else:
        wide_up, wide_down = (rounded_factor(factor, ctx.rounding, grad) for factor in (up, down))
        wide_core = core.to(grad)
        merges = _merges(len(grad), *ctx.shape, need_core or need_down)
        if need_x and merges:
            grad_x = grad @ _merged(
                packed, ctx.fmt, ctx.shape, _times(wide_up, wide_core), wide_down
            )
        elif need_x:
            grad_x = grad @ residual(packed, ctx.fmt, ctx.shape, grad.dtype)
        if narrow is None and (need_up or need_core):
            narrow = tokens @ wide_down.T
        if need_up:  # transposed: a product is faster when its short side is the rows
            grad_up = (_times(narrow, wide_core, transposed=True).T @ grad).T.to(up)
        if need_core or need_down or (need_x and not merges):
            back = grad @ wide_up
            if need_core:  # in half precision the products of two scaled factors would overflow
                grad_core = _core_gradient(back.to(core.dtype), narrow.to(core.dtype), core)
            back = _times(back, wide_core)
            if need_down:
                grad_down = (back.T @ tokens).to(down)
            if need_x and not merges:
                grad_x.addmm_(back, wide_down)
    grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
    grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if need_bias else None
    return grad_x, grad_up, grad_core, grad_down, grad_bias, *(None,) * 6


def residual(
    packed: Packed, fmt: QuantFormat | None, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The frozen weight, (out, in); with 4 bits a new tensor."""
    return packed.weight.to(dtype) if fmt is None else dequantize(packed, fmt, shape, dtype)


def _merged(
    packed: Packed, fmt: QuantFormat | None, shape: tuple[int, int], scaled_up: Tensor, down: Tensor
) -> Tensor:
    dense = residual(packed, fmt, shape, down.dtype)
    return torch.addmm(dense, scaled_up, down) if fmt is None else dense.addmm_(scaled_up, down)


def _frozen_product(
    tokens: Tensor,
    packed: Packed,
    fmt: QuantFormat | None,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    if fmt is None:
        return nn.functional.linear(tokens, packed.weight.to(tokens.dtype), bias)
    return linear(tokens, packed, fmt, shape, bias)


def _times(rows: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
    """The product rows @ core (or its transpose), for a matrix or a diagonal one as vector."""
    if core.dim() == 1:
        return rows * core
    return rows @ (core.T if transposed else core)


def _core_gradient(left: Tensor, right: Tensor, core: Tensor) -> Tensor:
    gradient = (left * right).sum(0) if core.dim() == 1 else left.T @ right
    return gradient.to(core)


def rounded_factor(factor: Tensor, rounding: torch.dtype, like: Tensor) -> Tensor:
    """A factor rounded, then in the dtype and on the device of another tensor; the gradient passes through."""
    if torch.compiler.is_compiling():
        factor = _opaquely_rounded(factor, rounding)
    return factor.to(rounding).to(like)


@torch.library.custom_op("qrefta::rounded", mutates_args=())
def _opaquely_rounded(factor: Tensor, rounding: torch.dtype) -> Tensor:
    """Inductor drops a conversion to bf16 and back as pointless; it does not look into an operation of our own."""
    return factor.to(rounding, copy=True)


@_opaquely_rounded.register_fake
def _(factor: Tensor, rounding: torch.dtype) -> Tensor:
    return torch.empty_like(factor, dtype=rounding)


def _pass_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_opaquely_rounded.register_autograd(_pass_through)
