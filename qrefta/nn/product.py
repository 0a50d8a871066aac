"""The product of tokens with a frozen weight, and with its low-rank update, as autograd functions.

    y = x W^T + ((x down^T) core^T) up^T + bias

W is frozen, in 4 bits or dense; `core` is a matrix, a vector that stands for a diagonal one, or
None, which stands for the identity. The update is added to the product, or merged into the
dequantized W before the product, whichever is cheaper (`qrefta.nn.cost`). Merging happens outside
autograd: there is no gradient of a dense weight, and nothing dense is kept.

Kept for the backward pass: x, and where it was made x down^T, each only if a gradient needs it.

A product is two autograd functions. The first keeps what the gradients need, and computes them; its
output is an outline of the product, without values. The second computes the product, and passes its
gradient to the first. The reason is gradient checkpointing, which stops computing a block again
once all that the block keeps is there. Autograd keeps tensors when a forward function returns. With
one function it would compute the last product of every block again, and nobody would read it.

The autograd functions take and give matrices, (tokens, in) and (tokens, out). The leading axes come
back outside of them: some models change the output of a linear layer in place (Falcon, Longformer),
which autograd refuses for a view that a custom function returned.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrefta._compat.torch import with_shape
from qrefta.nn.cost import merging_is_cheaper
from qrefta.nn.first_order import first_order
from qrefta.nn.quantized import FrozenWeight, frozen_weight


class _Frozen(NamedTuple):
    """The arguments of an adapted product that take no gradient.

    Attributes:
        weight: W, (out, in).
        rounding: dtype that `up` and `down` are rounded to.
        merges: whether the update is merged into W for the product.
    """

    weight: FrozenWeight
    rounding: torch.dtype
    merges: bool


def adapted_product(
    x: Tensor,
    up: Tensor,
    core: Tensor | None,
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
        core: (R, S), the diagonal (R,), or None for the identity.
        down: (S, in).
        bias: (out,) or None.
        weight: W, (out, in).
        rounding: dtype that `up` and `down` are rounded to.
    """
    out_features, in_features = weight.shape
    tokens = x.reshape(-1, in_features)
    recorded = torch.is_grad_enabled()
    factors = [factor for factor in (up, core, down) if factor is not None]
    gradients = recorded and any(factor.requires_grad for factor in factors)
    merges = merging_is_cheaper(len(tokens), in_features, out_features, gradients)
    frozen = _Frozen(weight, rounding, merges)
    if recorded:
        outline, narrow = _AdaptedGradients.apply(tokens, up, core, down, bias, frozen)
        constants = [None if one is None else one.detach() for one in (up, core, down, bias)]
        y = _AdaptedProduct.apply(outline, *constants, tokens.detach(), narrow, frozen)
    else:
        narrow = None if merges else _narrow(tokens, down, rounding)
        y = _forward(up, core, down, bias, tokens, narrow, frozen)
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
        outline = _FrozenGradients.apply(tokens, bias, weight)
        offset = None if bias is None else bias.detach()
        y = _FrozenProduct.apply(outline, tokens.detach(), offset, weight)
    else:
        y = _frozen_forward(tokens, bias, weight)
    return with_shape(y, (*x.shape[:-1], weight.shape[0]))


def rounded_factor(factor: Tensor, rounding: torch.dtype, like: Tensor) -> Tensor:
    """A factor rounded to a dtype, then in the dtype and on the device of `like`.

    The gradient passes through the rounding, and is rounded to the same dtype.
    """
    if torch.compiler.is_compiling():
        factor = _opaquely_rounded(factor, rounding)
    return factor.to(rounding).to(like)


def times(rows: Tensor, core: Tensor | None) -> Tensor:
    """The product rows @ core, for a core as in `adapted_product`."""
    if core is None:
        return rows
    return rows * core if core.dim() == 1 else rows @ core


class _AdaptedGradients(torch.autograd.Function):
    """The outline of `adapted_product`, x down^T if it was made, and the gradients of the product.

    With g the gradient of y and h = x down^T:
        dx = g W + (g up core) down        dup = g^T (h core^T)
        ddown = (g up core)^T x            dcore = (g up)^T h, or its diagonal
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        up: Tensor,
        core: Tensor | None,
        down: Tensor,
        bias: Tensor | None,
        frozen: _Frozen,
    ) -> tuple[Tensor, Tensor | None]:
        weight, rounding, merges = frozen
        _, need_up, need_core, need_down, _ = ctx.needs_input_grad[:5]
        # Keeping x down^T, which is narrow, saves keeping x.
        replaces_tokens = (need_up or need_core) and not need_down
        narrow = _narrow(tokens, down, rounding) if replaces_tokens or not merges else None
        ctx.rounding = rounding
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept_tokens = tokens if need_down else None
        kept_narrow = narrow if need_up or need_core else None
        _save(ctx, weight, kept_tokens, kept_narrow, up, core, down)
        if narrow is not None:
            ctx.mark_non_differentiable(narrow)
        ctx.set_materialize_grads(False)  # no zeros for `narrow`
        return _outline(tokens, weight), narrow

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # compute in the gradient's dtype
            return _gradients(ctx, grad)


class _AdaptedProduct(torch.autograd.Function):
    """`adapted_product`, whose gradient goes to its outline."""

    @staticmethod
    def forward(
        ctx: Any,
        outline: Tensor,
        up: Tensor,
        core: Tensor | None,
        down: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        narrow: Tensor | None,
        frozen: _Frozen,
    ) -> Tensor:
        return _forward(up, core, down, bias, tokens, narrow, frozen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * 7


class _FrozenGradients(torch.autograd.Function):
    """The outline of `frozen_product`, and the gradients of the product: dx = g W, and dbias is the
    sum of g over tokens.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save(ctx, weight)
        return _outline(tokens, weight)

    @staticmethod
    @first_order
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


class _FrozenProduct(torch.autograd.Function):
    """`frozen_product`, whose gradient goes to its outline."""

    @staticmethod
    def forward(
        ctx: Any, outline: Tensor, tokens: Tensor, bias: Tensor | None, weight: FrozenWeight
    ) -> Tensor:
        return _frozen_forward(tokens, bias, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


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


def _outline(tokens: Tensor, weight: FrozenWeight) -> Tensor:
    """A tensor like the product of tokens with a weight, (tokens, out), with memory for one value,
    which is not set.
    """
    return tokens.new_empty_strided((len(tokens), weight.shape[0]), (0, 0))


def _frozen_forward(tokens: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    offset = None if bias is None else bias.to(tokens.dtype)
    return weight.matmul(tokens, offset)


def _narrow(tokens: Tensor, down: Tensor, rounding: torch.dtype) -> Tensor:
    """The product x down^T, (tokens, S)."""
    return tokens @ rounded_factor(down, rounding, tokens).T


def _forward(
    up: Tensor,
    core: Tensor | None,
    down: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    narrow: Tensor | None,
    frozen: _Frozen,
) -> Tensor:
    """The product, (tokens, out); `narrow`, which is x down^T, is needed if nothing is merged."""
    weight, rounding, merges = frozen
    offset = None if bias is None else bias.to(tokens.dtype)
    up = rounded_factor(up, rounding, tokens)
    core = None if core is None else core.to(tokens)
    if merges:
        down = rounded_factor(down, rounding, tokens)
        merged = weight.plus_product(times(up, core), down)
        return linear(tokens, merged, offset)
    assert narrow is not None, "x down^T is made if nothing is merged"
    y = weight.matmul(tokens, offset)
    y.addmm_(_times_transposed(narrow, core), up.T)
    return y


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `_AdaptedGradients.forward`."""
    (tokens, narrow, up, core, down), weight = _saved(ctx)
    need_x, need_up, need_core, need_down, need_bias = ctx.needs_input_grad[:5]
    out_features, in_features = weight.shape
    wide_up = rounded_factor(up, ctx.rounding, grad)
    wide_down = rounded_factor(down, ctx.rounding, grad)
    wide_core = None if core is None else core.to(grad)
    grad_x = grad_up = grad_core = grad_down = grad_bias = None

    gradients = need_core or need_down
    merges = merging_is_cheaper(len(grad), out_features, in_features, gradients)
    if need_x and merges:
        grad_x = grad @ weight.plus_product(times(wide_up, wide_core), wide_down)
    elif need_x:
        grad_x = grad @ weight.dequantize(grad.dtype)

    if (need_up or need_core) and narrow is None:
        narrow = tokens @ wide_down.T
    # Transposed: a matmul is faster when its short side is the rows.
    if need_up:
        grad_up = (_times_transposed(narrow, wide_core).T @ grad).T.to(up)

    if need_core or need_down or (need_x and not merges):
        back = (wide_up.T @ grad.T).T
        if need_core and core is not None:
            # In half precision the products of two scaled factors would overflow.
            grad_core = _core_gradient(back.to(core.dtype), narrow.to(core.dtype), core)
        back = times(back, wide_core)
        if need_down:
            grad_down = (back.T @ tokens).to(down)
        if grad_x is not None and not merges:
            grad_x.addmm_(back, wide_down)

    if need_bias:
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_up, grad_core, grad_down, grad_bias, None


def _times_transposed(rows: Tensor, core: Tensor | None) -> Tensor:
    """The product rows @ core^T."""
    return times(rows, core.T if core is not None and core.dim() == 2 else core)


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
