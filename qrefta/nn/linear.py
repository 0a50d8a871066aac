"""The one adapted layer: a frozen linear in 4 (or 16) bits that uses its stack's factors."""

import torch
from torch import Tensor, nn

from qrefta._compat.torch import direct_parameters, is_replica
from qrefta.distributed import check_gathered
from qrefta.nn.factors import FactorBank, Factors, frozen
from qrefta.nn.product import adapted_product, residual
from qrefta.nn.quantized import Packed, QuantFormat


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
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        fmt: QuantFormat | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.fmt = fmt
        if fmt is None:
            self.weight = frozen(torch.empty(out_features, in_features, dtype=dtype))
        else:
            sizes = fmt.packed_sizes(in_features * out_features)
            self.weight = frozen(torch.empty(sizes.pop("weight"), dtype=torch.int8))
            for name, size in sizes.items():
                self.register_parameter(name, frozen(torch.empty(size, dtype=torch.uint8)))
        self.bias = frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        self._adapter: tuple[FactorBank, str, int] | None = (
            None  # a tuple: not registered as a submodule
        )

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
                    setattr(self, name, frozen(tensor))
        else:
            self.weight = frozen(weight)
        self.bias = None if bias is None else frozen(bias.detach())

    def residual(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight, dequantized, (out, in)."""
        return residual(self.packed(), self.fmt, (self.out_features, self.in_features), dtype)

    def packed(self) -> Packed:
        own = direct_parameters(self)  # attribute access is slow enough to show in decoding
        check_gathered(own["weight"], "packed weights of a block")
        return Packed(own["weight"], own.get("absmax"), own.get("absmax_state"))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """dequant(Q_l) + Delta_l, (out, in), float32."""
        weight = self.residual(torch.float32)
        return (
            weight
            if self.factors is None
            else weight + self.factors.delta(self._adapter[2]).to(weight.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(
                f"AdaptedLinear takes floating input, not {x.dtype}; was it cast to the packed weight's dtype?"
            )
        if is_replica(self):
            raise ValueError(
                "nn.DataParallel copies layers to other devices without the factors that they share, so it cannot run "
                "a prepared model. Use one process a GPU (torchrun, DDP); where Trainer chose it for several "
                "GPUs, show it one: CUDA_VISIBLE_DEVICES=0."
            )
        kind = x.device.type
        if (
            torch.amp.is_autocast_available(kind)
            and torch.is_autocast_enabled(kind)
            and x.dtype != torch.float64
        ):
            x = x.to(torch.get_autocast_dtype(kind))
        if self._adapter is None:
            shape = (self.out_features, self.in_features)
            return adapted_product(
                x, None, None, None, self.bias, self.packed(), self.fmt, shape, None
            )
        bank, key, layer = self._adapter
        factors = bank[key]
        check_gathered(next(iter(direct_parameters(factors).values())), "shared factors")
        return factors.product(x, layer, self.bias, self.packed(), self.fmt)

    def extra_repr(self) -> str:
        stored = (
            "16 bits" if self.fmt is None else f"{self.fmt.quant_type}, block {self.fmt.block_size}"
        )
        rank = 0 if self.factors is None else self.factors.rank
        return f"in_features={self.in_features}, out_features={self.out_features}, {stored}, rank={rank}"
