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

from qrefta.nn.quantized import FrozenWeight, frozen_weight


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


class _Frozen(NamedTuple):
    """The arguments of `_AdaptedProduct` that take no gradient."""

    weight: FrozenWeight
    rounding: torch.dtype


def adapted_product(
    x: Tensor,
    up: Tensor,
    core: Tensor,
    down: Tensor,
    bias: Tensor | None,
    weight: FrozenWeight,
    rounding: torch.dtype,
) -> Tensor:
    """The product x W^T + ((x down^T) core^T) up^T + bias, differentiable in x, up, core, down and bias.

    Args:
        x: (..., in).
        up, core, down: (out, R), (R, S) or the diagonal (R,), and (S, in). They may be on another device than x: they
            are moved after they are rounded, and no copy of them is kept.
        bias: (out,) or None.
        weight: W, (out, in).
        rounding: dtype that up and down are rounded to.
    """
    frozen = _Frozen(weight, rounding)
    if torch.is_grad_enabled():
        return _AdaptedProduct.apply(x, up, core, down, bias, frozen)
    y, _ = _forward(x, up, core, down, bias, frozen, gradients=False)
    return y.view(*x.shape[:-1], weight.shape[0])


def frozen_product(x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    """The product x W^T + bias, (..., out), differentiable in x and bias.

    Args:
        x: (..., in).
        bias: (out,) or None.
        weight: W, (out, in).
    """
    if torch.is_grad_enabled():
        return _FrozenProduct.apply(x, bias, weight)
    return _frozen_forward(x, bias, weight)


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
        up: Tensor,
        core: Tensor,
        down: Tensor,
        bias: Tensor | None,
        frozen: _Frozen,
    ) -> Tensor:
        _, need_up, need_core, need_down, _ = ctx.needs_input_grad[:5]
        weight, rounding = frozen
        out_features, in_features = weight.shape
        gradients = need_up or need_core or need_down
        y, narrow = _forward(x, up, core, down, bias, frozen, gradients)
        if narrow is None and gradients and not need_down:  # then x need not be kept for it
            narrow = x.reshape(-1, in_features) @ rounded_factor(down, rounding, x).T
        ctx.rounding = rounding
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept_x = x.reshape(-1, in_features) if need_down else None
        kept_narrow = narrow if need_up or need_core else None
        _save(ctx, weight, kept_x, kept_narrow, up, core, down)
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # all is in the gradient's dtype
            return _gradients(ctx, grad)


class _FrozenProduct(torch.autograd.Function):
    """`frozen_product` and its gradients, dx = g W and dbias = the sum of g."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save(ctx, weight)
        return _frozen_forward(x, bias, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = _saved(ctx)
        need_x, need_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, weight.shape[0])
        grad_x = None
        grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_x:
                product = rows @ weight.dequantize(grad.dtype)
                grad_x = product.view(*grad.shape[:-1], weight.shape[1])
            if need_bias:
                grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None


def _save(ctx: Any, weight: FrozenWeight, *tensors: Tensor | None) -> None:
    """Keep tensors and a frozen weight for the backward pass.

    The weight's tensors are saved as autograd's, not as attributes of `ctx`: then gradient checkpointing drops them,
    which matters where a weight is a copy on its way through a device (offloading, FSDP).
    """
    ctx.format = weight.format
    ctx.shape = weight.shape
    ctx.save_for_backward(*tensors, *weight.tensors().values())
    ctx.count = len(tensors)


def _saved(ctx: Any) -> tuple[tuple[Tensor | None, ...], FrozenWeight]:
    """The tensors and the weight that `_save` kept."""
    saved = ctx.saved_tensors
    weight = frozen_weight(ctx.format, ctx.shape, *saved[ctx.count :])
    return saved[: ctx.count], weight


def _frozen_forward(x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    tokens = x.reshape(-1, weight.shape[1])
    y = weight.matmul(tokens, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward(
    x: Tensor,
    up: Tensor,
    core: Tensor,
    down: Tensor,
    bias: Tensor | None,
    frozen: _Frozen,
    gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """The product, (tokens, out), and x down^T if it was made."""
    weight, rounding = frozen
    out_features, in_features = weight.shape
    tokens = x.reshape(-1, in_features)
    offset = None if bias is None else bias.to(x.dtype)
    wide_up = rounded_factor(up, rounding, x)
    wide_down = rounded_factor(down, rounding, x)
    core = core.to(x)
    if _merges(len(tokens), in_features, out_features, gradients):
        merged = weight.plus_product(_times(wide_up, core), wide_down)
        return nn.functional.linear(tokens, merged, offset), None
    narrow = tokens @ wide_down.T
    y = weight.matmul(tokens, offset)
    return y.addmm_(_times(narrow, core, transposed=True), wide_up.T), narrow


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (tokens, narrow, up, core, down), weight = _saved(ctx)
    need_x, need_up, need_core, need_down, need_bias = ctx.needs_input_grad[:5]
    grad = grad.reshape(-1, weight.shape[0])
    grad_x = grad_up = grad_core = grad_down = grad_bias = None
    wide_up = rounded_factor(up, ctx.rounding, grad)
    wide_down = rounded_factor(down, ctx.rounding, grad)
    wide_core = core.to(grad)
    merges = _merges(len(grad), *weight.shape, need_core or need_down)
    if need_x and merges:
        grad_x = grad @ weight.plus_product(_times(wide_up, wide_core), wide_down)
    elif need_x:
        grad_x = grad @ weight.dequantize(grad.dtype)
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
    if need_x:
        grad_x = grad_x.view(ctx.x_shape)
    if need_bias:
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_up, grad_core, grad_down, grad_bias, None


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
