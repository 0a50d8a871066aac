"""The adapted linear layer: a frozen weight in 4 (or 16) bits, with the factors of its stack."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrefta._compat.torch import direct_parameters, is_replica
from qrefta.distributed import check_gathered
from qrefta.nn.bank import FactorBank
from qrefta.nn.factors import Factors, frozen
from qrefta.nn.packed import PackedBytes, plain_bytes
from qrefta.nn.packed_parameters import pack, warn_of_other_bytes
from qrefta.nn.product import frozen_product
from qrefta.nn.quantized import FrozenWeight, QuantFormat, frozen_weight


class AdaptedLinear(nn.Module):
    """A frozen linear layer in 4 (or 16) bits, with or without factors.

    Args:
        in_features, out_features: shape of the weight.
        bias: whether there is a bias; frozen unless it is made to require a gradient.
        fmt: the 4-bit format; None keeps the weight as a plain (out, in) matrix.
        dtype: of the bias, and of the weight if `fmt` is None.

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
            self._packed = tuple(sizes)
            self.weight = frozen(torch.empty(sizes.pop("weight"), dtype=torch.int8))
            for name, size in sizes.items():
                self.register_parameter(name, frozen(torch.empty(size, dtype=torch.uint8)))
        self.bias = frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        # In a tuple, so that the bank is not registered as a submodule.
        self._adapter: tuple[FactorBank, str, int] | None = None

    def attach(self, bank: FactorBank, key: str, layer: int) -> None:
        """Use the factors `bank[key]` as layer number `layer` of their stack."""
        self._adapter = (bank, key, layer)

    def follow_freezing(self) -> None:
        """Let code that freezes the packed weight freeze the layer's part of the factors.

        The factors are at the root of a model. So `model.freeze_encoder()`, and
        `requires_grad_(False)` of a tower, reach the weights in it, and not their factors.
        """
        weight = self._parameters.get("weight")
        if self._adapter is not None and isinstance(weight, PackedBytes):
            bank, key, layer = self._adapter
            weight.when_frozen = partial(cast(Factors, bank[key]).freeze_layer, layer)

    @property
    def factors(self) -> Factors | None:
        """The factors of the layer's stack, if it has any."""
        if self._adapter is None:
            return None
        bank, key, _ = self._adapter
        return cast(Factors, bank[key])

    @property
    def row(self) -> int | None:
        """The layer's number among the layers of its factors, if it has any."""
        return None if self._adapter is None else self._adapter[2]

    def uses(self, bank: FactorBank) -> bool:
        """Whether the layer's factors are in a bank; a copied layer has a copy of them."""
        return self._adapter is not None and self._adapter[0] is bank

    def store(self, weight: FrozenWeight, bias: Tensor | None) -> None:
        """Fill the layer with a weight of its format, and a bias."""
        for name, tensor in weight.tensors().items():
            setattr(self, name, frozen(tensor))
        self.bias = None if bias is None else frozen(bias.detach())

    def residual(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight, dequantized, (out, in)."""
        return self.frozen_weight().dequantize(dtype)

    def frozen_weight(self) -> FrozenWeight:
        """The frozen weight as it is stored."""
        # A module's attribute look-up is slow enough to be seen in decoding.
        parameters = direct_parameters(self)
        if "weight" not in parameters:
            raise ValueError(
                "The packed weight of a layer was replaced, as torch's parametrize, weight_norm "
                "and prune do; they need a dense model: qrefta.merge(model)."
            )
        weight = cast(Tensor, parameters["weight"])
        check_gathered(weight, "packed weights of a block")
        shape = (self.out_features, self.in_features)
        if self.fmt is None:
            return frozen_weight(None, shape, weight)
        packed = [plain_bytes(cast(Tensor, parameters[name])) for name in self._packed]
        return frozen_weight(self.fmt, shape, *packed)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """dequant(Q_l) + Delta_l, (out, in), float32."""
        weight = self.residual(torch.float32)
        if self._adapter is None or self.factors is None:
            return weight
        layer = self._adapter[2]
        return weight + self.factors.delta(layer).to(weight.device)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise ValueError(
                f"AdaptedLinear takes floating-point input, not {input.dtype}. Was it cast to "
                "the dtype of the packed weight?"
            )
        if is_replica(self):
            raise ValueError(
                "nn.DataParallel copies layers to other devices without the factors that they "
                "share, so it cannot run a prepared model. Use one process a GPU (torchrun, DDP). "
                "If Trainer chose DataParallel because it sees several GPUs, show it one: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        x = _autocast(input)
        if self._adapter is None:
            return frozen_product(x, self.bias, self.frozen_weight())
        bank, key, layer = self._adapter
        factors = cast(Factors, bank[key])
        first_parameter = cast(Tensor, next(iter(direct_parameters(factors).values())))
        check_gathered(first_parameter, "shared factors")
        if first_parameter.is_meta and not x.is_meta:
            raise ValueError(
                "The shared factors are on the meta device, where accelerate offloaded them "
                "(cpu_offload, disk_offload, dispatch_model): all layers read them, so they stay "
                "on one device. Load the folder with a device_map, which keeps them there."
            )
        if self.training and torch.is_grad_enabled():
            bank.warn_if_frozen()
        return factors.product(x, layer, self.bias, self.frozen_weight())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.fmt is not None:
            warn_of_other_bytes(self, self._packed, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.fmt is not None:
            pack(self, self._packed)  # load_state_dict(assign=True) replaced the parameters
            self.follow_freezing()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.follow_freezing()  # copied and pickled bytes have no link to the factors

    def extra_repr(self) -> str:
        stored = "16 bits"
        if self.fmt is not None:
            stored = f"{self.fmt.quant_type}, block {self.fmt.block_size}"
        rank = 0 if self.factors is None else self.factors.rank
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {stored}, rank={rank}"


def has_adapted_layer(model: nn.Module, path: str) -> bool:
    """Whether a model has an adapted linear layer at a module path."""
    try:
        return isinstance(model.get_submodule(path), AdaptedLinear)
    except AttributeError:
        return False


def adapted_layer(model: nn.Module, path: str) -> AdaptedLinear:
    """The adapted linear layer at a module path of a prepared model."""
    layer = model.get_submodule(path)
    assert isinstance(layer, AdaptedLinear), f"{path} is not an adapted linear layer"
    return layer


def _autocast(x: Tensor) -> Tensor:
    """The input in autocast's dtype, if autocast is on; float64 stays as it is."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    if not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
