"""The one adapted layer and its autograd function.

    y = x . dequant(Q)^T + ((x . down^T) * core) . up^T + bias

The 4-bit weight is dequantized in the forward pass and once more in the backward pass, the dense update is never
formed, and no gradient of a dense weight exists. Kept for the backward pass: x, and x . down^T (tokens x rank).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qrefta.factors import FactorBank, Factors
from qrefta.quantize import Packed, QuantFormat, dequantize


class AdaptedLinear(nn.Module):
    """A frozen linear in 4 (or 16) bits, with or without factors.

    Args:
        in_features, out_features: shape of the weight.
        bias: whether there is a bias; frozen unless it is made to require grad.
        fmt: the 4-bit format; None keeps the weight as a plain (out, in) matrix.
        dtype: of the bias, and of the weight where `fmt` is None.

    Shapes: input (..., in), output (..., out), in the input's dtype; under autocast in autocast's.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, fmt: QuantFormat | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.fmt = fmt
        if fmt is None:
            self.weight = _frozen(torch.empty(out_features, in_features, dtype=dtype))
        else:
            sizes = fmt.packed_sizes(in_features * out_features)
            self.weight = _frozen(torch.empty(sizes.pop("weight"), dtype=torch.int8))
            for name, size in sizes.items():
                self.register_parameter(name, _frozen(torch.empty(size, dtype=torch.uint8)))
        self.bias = _frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        self._adapter: tuple[FactorBank, str, int] | None = None  # a tuple: not registered as a submodule

    def attach(self, bank: FactorBank, key: str, layer: int) -> None:
        """Use the factors `bank[key]` as layer number `layer` of their stack."""
        self._adapter = (bank, key, layer)

    @property
    def factors(self) -> Factors | None:
        return None if self._adapter is None else self._adapter[0][self._adapter[1]]

    def store(self, weight: Tensor | Packed, bias: Tensor | None) -> None:
        """Fill the layer with a packed (or, with 16 bits, dense) weight and a bias."""
        if isinstance(weight, Packed):
            for name, tensor in zip(Packed._fields, weight, strict=True):
                if tensor is not None:
                    setattr(self, name, _frozen(tensor))
        else:
            self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias.detach())

    def residual(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight, dequantized, (out, in)."""
        return _weight(self.packed(), self.fmt, (self.out_features, self.in_features), dtype)

    def packed(self) -> Packed:
        return Packed(*(getattr(self, name, None) for name in Packed._fields))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """dequant(Q_l) + Delta_l, (out, in), float32."""
        weight = self.residual(torch.float32)
        return weight if self.factors is None else weight + self.factors.delta(self._adapter[2]).to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(
                f"AdaptedLinear takes floating input, not {x.dtype}; was it cast to the packed weight's dtype?"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        factors = self.factors
        if factors is None:
            up = core = down = rounding = None
        else:
            up, down = factors.up().to(x.device), factors.down().to(x.device)
            core, rounding = factors.core(self._adapter[2]).to(x.device), factors.dtype
        shape = (self.out_features, self.in_features)
        return _AdaptedProduct.apply(x, up, core, down, self.bias, *self.packed(), self.fmt, shape, rounding)

    def extra_repr(self) -> str:
        stored = "16 bits" if self.fmt is None else f"{self.fmt.quant_type}, block {self.fmt.block_size}"
        rank = 0 if self.factors is None else self.factors.rank
        return f"in_features={self.in_features}, out_features={self.out_features}, {stored}, rank={rank}"


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + ((x down^T) * core) up^T + bias, with gradients for x, up, core, down and bias.

    With g the gradient of y and h = x down^T:
        dx = g W + ((g up) * core) down        dup = g^T (h * core)
        ddown = ((g up) * core)^T x            dcore = sum over tokens of (g up) * h
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
        tokens = x.reshape(-1, x.shape[-1])
        dense = _weight(Packed(weight, absmax, absmax_state), fmt, shape, x.dtype)
        y = nn.functional.linear(tokens, dense, None if bias is None else bias.to(x.dtype))
        del dense
        narrow = None
        if up is not None:
            narrow = tokens @ down.to(rounding).to(x.dtype).T
            y.addmm_(narrow * core.to(x.dtype), up.to(rounding).to(x.dtype).T)
        ctx.fmt, ctx.shape, ctx.rounding, ctx.x_shape = fmt, shape, rounding, x.shape
        kept = tokens if down is not None and ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, narrow, up, core, down, weight, absmax, absmax_state)
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, narrow, up, core, down, weight, absmax, absmax_state = ctx.saved_tensors
        need_x, need_up, need_core, need_down, need_bias = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, ctx.shape[0])
        grad_x = grad_up = grad_core = grad_down = None
        if need_x:
            grad_x = grad @ _weight(Packed(weight, absmax, absmax_state), ctx.fmt, ctx.shape, grad.dtype)
        if up is not None:
            diagonal = core.to(grad.dtype)
            back = grad @ up.to(ctx.rounding).to(grad.dtype)
            if need_up:
                grad_up = (grad.T @ (narrow * diagonal)).to(up.dtype)
            if need_core:
                grad_core = (back * narrow).sum(0).to(core.dtype)
            back = back * diagonal
            if need_down:
                grad_down = (back.T @ tokens).to(down.dtype)
            if need_x:
                grad_x.addmm_(back, down.to(ctx.rounding).to(grad.dtype))
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        grad_bias = grad.sum(0) if need_bias else None
        return grad_x, grad_up, grad_core, grad_down, grad_bias, *(None,) * 6


def _weight(packed: Packed, fmt: QuantFormat | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return packed.weight.to(dtype) if fmt is None else dequantize(packed, fmt, shape, dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
