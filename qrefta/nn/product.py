"""The product of tokens with a frozen weight, and with its low-rank update, as autograd functions.

    y = x W^T + ((x down^T) core^T) up^T + bias

W is frozen, in 4 bits or dense; `core` is a matrix, or a vector that stands for a diagonal one. The
update is added to the product, or merged into the dequantized W before the product, whichever is
cheaper (`qrefta.nn.cost`). Merging
happens outside autograd: there is no gradient of a dense weight, and nothing dense is kept.

Kept for the backward pass: x, and where it was made x down^T, each only if a gradient needs it.

The autograd functions take and give matrices, (tokens, in) and (tokens, out). The leading axes come
back outside of them: some models change the output of a linear layer in place (Falcon, Longformer),
which autograd refuses for a view that a custom function returned.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qrefta._compat.torch import with_shape
from qrefta.nn.cost import merging_is_cheaper
from qrefta.nn.quantized import FrozenWeight, frozen_weight


class _Frozen(NamedTuple):
    """The arguments of an adapted product that take no gradient."""

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
    """The product x W^T + ((x down^T) core^T) up^T + bias, (..., out).

    It is differentiable in x, up, core, down and bias. The factors may be on another device than x.
    They are moved after they are rounded, and no copy of them is kept.

    Args:
        x: (..., in).
        up: (out, R).
        core: (R, S), or the diagonal (R,).
        down: (S, in).
        bias: (out,) or None.
        weight: W, (out, in).
        rounding: dtype that `up` and `down` are rounded to.
    """
    tokens = x.reshape(-1, weight.shape[1])
    frozen = _Frozen(weight, rounding)
    if torch.is_grad_enabled():
        y = _AdaptedProduct.apply(tokens, up, core, down, bias, frozen)
    else:
        y, _ = _forward(tokens, up, core, down, bias, frozen, gradients=False)
    return with_shape(y, (*x.shape[:-1], weight.shape[0]))


def frozen_product(x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    """The product x W^T + bias, (..., out), differentiable in x and bias.

    Args:
        x: (..., in).
        bias: (out,) or None.
        weight: W, (out, in).
    """
    tokens = x.reshape(-1, weight.shape[1])
    if torch.is_grad_enabled():
        y = _FrozenProduct.apply(tokens, bias, weight)
    else:
        y = _frozen_forward(tokens, bias, weight)
    return with_shape(y, (*x.shape[:-1], weight.shape[0]))


def rounded_factor(factor: Tensor, rounding: torch.dtype, like: Tensor) -> Tensor:
    """A factor rounded to a dtype, then in the dtype and on the device of `like`.

    The gradient passes through the rounding.
    """
    if torch.compiler.is_compiling():
        factor = _opaquely_rounded(factor, rounding)
    return factor.to(rounding).to(like)


class _AdaptedProduct(torch.autograd.Function):
    """`adapted_product` and its gradients.

    With g the gradient of y and h = x down^T:
        dx = g W + (g up core) down        dup = g^T (h core^T)
        ddown = (g up core)^T x            dcore = (g up)^T h, or its diagonal
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        up: Tensor,
        core: Tensor,
        down: Tensor,
        bias: Tensor | None,
        frozen: _Frozen,
    ) -> Tensor:
        _, need_up, need_core, need_down, _ = ctx.needs_input_grad[:5]
        gradients = need_up or need_core or need_down
        y, narrow = _forward(tokens, up, core, down, bias, frozen, gradients)
        if narrow is None and gradients and not need_down:
            # Keeping x down^T, which is narrow, saves keeping x.
            narrow = tokens @ rounded_factor(down, frozen.rounding, tokens).T
        ctx.rounding = frozen.rounding
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept_tokens = tokens if need_down else None
        kept_narrow = narrow if need_up or need_core else None
        _save(ctx, frozen.weight, kept_tokens, kept_narrow, up, core, down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # compute in the gradient's dtype
            return _gradients(ctx, grad)


class _FrozenProduct(torch.autograd.Function):
    """`frozen_product` and its gradients: dx = g W, and dbias is the sum of g over tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save(ctx, weight)
        return _frozen_forward(tokens, bias, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = _saved(ctx)
        need_tokens, need_bias, _ = ctx.needs_input_grad
        grad_tokens = None
        grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):  # compute in the gradient's dtype
            if need_tokens:
                grad_tokens = grad @ weight.dequantize(grad.dtype)
            if need_bias:
                grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_tokens, grad_bias, None


def _save(ctx: Any, weight: FrozenWeight, *tensors: Tensor | None) -> None:
    """Keep tensors and a frozen weight for the backward pass.

    The tensors of the weight are saved by autograd and not as attributes of `ctx`, so that gradient
    checkpointing frees
    them: with offloading they are copies that are there for one forward pass.
    """
    ctx.format = weight.format
    ctx.shape = weight.shape
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *weight.tensors().values())


def _saved(ctx: Any) -> tuple[tuple[Any, ...], FrozenWeight]:
    """The tensors and the weight that `_save` kept."""
    saved = ctx.saved_tensors
    weight = frozen_weight(ctx.format, ctx.shape, *saved[ctx.count :])
    return saved[: ctx.count], weight


def _frozen_forward(tokens: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    offset = None if bias is None else bias.to(tokens.dtype)
    return weight.matmul(tokens, offset)


def _forward(
    tokens: Tensor,
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
    offset = None if bias is None else bias.to(tokens.dtype)
    up = rounded_factor(up, rounding, tokens)
    down = rounded_factor(down, rounding, tokens)
    core = core.to(tokens)
    if merging_is_cheaper(len(tokens), in_features, out_features, gradients):
        merged = weight.plus_product(_times(up, core), down)
        return linear(tokens, merged, offset), None
    narrow = tokens @ down.T
    y = weight.matmul(tokens, offset)
    y.addmm_(_times_transposed(narrow, core), up.T)
    return y, narrow


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `_AdaptedProduct.forward`."""
    (tokens, narrow, up, core, down), weight = _saved(ctx)
    need_x, need_up, need_core, need_down, need_bias = ctx.needs_input_grad[:5]
    out_features, in_features = weight.shape
    wide_up = rounded_factor(up, ctx.rounding, grad)
    wide_down = rounded_factor(down, ctx.rounding, grad)
    wide_core = core.to(grad)
    grad_x = grad_up = grad_core = grad_down = grad_bias = None

    gradients = need_core or need_down
    merges = merging_is_cheaper(len(grad), out_features, in_features, gradients)
    if need_x and merges:
        grad_x = grad @ weight.plus_product(_times(wide_up, wide_core), wide_down)
    elif need_x:
        grad_x = grad @ weight.dequantize(grad.dtype)

    if (need_up or need_core) and narrow is None:
        narrow = tokens @ wide_down.T
    # Transposed: a matmul is faster when its short side is the rows.
    if need_up:
        grad_up = (_times_transposed(narrow, wide_core).T @ grad).T.to(up)

    if need_core or need_down or (need_x and not merges):
        back = (wide_up.T @ grad.T).T
        if need_core:
            # In half precision the products of two scaled factors would overflow.
            grad_core = _core_gradient(back.to(core.dtype), narrow.to(core.dtype), core)
        back = _times(back, wide_core)
        if need_down:
            grad_down = (back.T @ tokens).to(down)
        if grad_x is not None and not merges:
            grad_x.addmm_(back, wide_down)

    if need_bias:
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_up, grad_core, grad_down, grad_bias, None


def _times(rows: Tensor, core: Tensor) -> Tensor:
    """The product rows @ core, for a matrix, or a diagonal one as a vector."""
    return rows * core if core.dim() == 1 else rows @ core


def _times_transposed(rows: Tensor, core: Tensor) -> Tensor:
    """The product rows @ core^T, for a matrix, or a diagonal one as a vector."""
    return rows * core if core.dim() == 1 else rows @ core.T


def _core_gradient(left: Tensor, right: Tensor, core: Tensor) -> Tensor:
    gradient = (left * right).sum(0) if core.dim() == 1 else left.T @ right
    return gradient.to(core)


@torch.library.custom_op("qrefta::rounded", mutates_args=())
def _opaquely_rounded(factor: Tensor, rounding: torch.dtype) -> Tensor:
    """A factor rounded, in an operation that inductor does not look into.

    Inductor removes a cast to bf16 and back.
    """
    return factor.to(rounding, copy=True)


@_opaquely_rounded.register_fake
def _(factor: Tensor, rounding: torch.dtype) -> Tensor:
    return torch.empty_like(factor, dtype=rounding)


def _pass_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_opaquely_rounded.register_autograd(_pass_through)
