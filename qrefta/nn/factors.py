"""The equation that all tensor methods share.

For the K layers of a stack:

    W_l ~ dequant(Q_l) + Delta_l        Delta_l = up . core_l . down

`down` (s x in) and `up` (out x r) are shared by all K layers; `core_l` (r x s, or diagonal) belongs
to its layer. A method is one final subclass: of `LowRankFactors`, where it says what these three
are and which parameters in them train, or of `Factors` itself if Delta_l has another form and its
product is computed in another way.

Trainable parameters are bf16 values: the forward pass, `delta`, merging and export see them rounded
to `dtype`. They are stored as float32 masters, because at a learning rate of 2e-4 an optimizer step
is smaller than half a bf16 step for most entries, and plain AdamW would lose it. With masters every
optimizer is right, for two bytes more an entry (10 MB for Llama-3-8B at R = 64). Masters that are
bf16 values are saved as bf16.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from qrefta._compat.torch import direct_parameters, version_counter
from qrefta.choices import TRANSFORMS
from qrefta.config.rank import Rank
from qrefta.config.settings import Settings
from qrefta.linalg.slices import Slices
from qrefta.nn.packed import packed_parameter
from qrefta.nn.packed_parameters import pack, warn_of_other_bytes
from qrefta.nn.product import adapted_product, rounded_factor, times
from qrefta.nn.quantized import FrozenWeight

_ALL_ROWS = slice(None)


class Factors(nn.Module, ABC):
    """Trainable and frozen tensors of one stack.

    Args:
        layers: K, linear layers in the stack.
        out_features, in_features: shape of each weight.
        rank: r, width of the factors; its meaning depends on the method.
        dtype: that trainable parameters are rounded to wherever they are used; float32 or wider:
            they are not rounded.

    Attributes:
        fits: whether `fit` takes a principal part out of the weights. If not, Delta is 0 at the
            start, the weights are quantized whole, there is nothing to refine, and `draw` fills the
            random parameters.
        transforms: mode-3 transforms that `fit` takes, the default first.
        master_dtype: that the parameters are stored in: `dtype`, or float32 if that is wider.
        slice_ranks: components of each transformed slice, summing to the rank; set by `fit`, not
            saved.
        frozen_layers: numbers of the layers that the user's code froze.
    """

    fits: ClassVar[bool] = False
    transforms: ClassVar[tuple[str, ...]] = TRANSFORMS

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layers = layers
        self.out_features = out_features
        self.in_features = in_features
        self.rank = rank
        self.dtype = dtype
        self.master_dtype = torch.promote_types(dtype, torch.float32)
        self.slice_ranks: list[int] = []
        self.frozen_layers: set[int] = set()

    def freeze_layer(self, layer: int) -> None:
        """Take note of a frozen layer; once all are frozen, so are the factors."""
        if len(self.frozen_layers) == self.layers and self.trains():
            self.frozen_layers.clear()  # they were set to train after that
        self.frozen_layers.add(layer)
        if len(self.frozen_layers) == self.layers:
            self.requires_grad_(False)

    @classmethod
    def fit(
        cls,
        slices: Slices,
        rank: Rank,
        transform: Tensor,
        dtype: torch.dtype,
        seed: int,
        starts: list[Tensor] | None = None,
    ) -> "Fit":
        """The factors nearest to a stack; if the method does not fit, factors whose Delta is 0.

        Args:
            slices: of the stack under `transform`.
            rank: r.
            transform: mode-3 transform, (layers, slices), float64.
            dtype: see the class.
            seed: of random numbers.
            starts: the subspaces of an earlier fit to nearly the same stack. With them one pass is
                enough.
        """
        with slices.device:
            factors = cls(*slices.shape, rank, dtype)
        with torch.no_grad():
            factors.draw(torch.Generator().manual_seed(seed))
        return Fit(factors, energy=0.0, starts=[])

    def draw(self, generator: torch.Generator) -> None:
        """Fill the random parameters with values of `dtype`.

        Args:
            generator: on the CPU, so that the values do not depend on the device.
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither fit nor draw.")

    @classmethod
    @abstractmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        """The largest rank that a stack of this shape takes."""

    @classmethod
    def rank_of(cls, layers: int, out_features: int, in_features: int, rank: Rank) -> Rank:
        """The rank that a stack of this shape gets if `rank` was asked for.

        Raises:
            ValueError: if the method has another number of ranks.
        """
        if not isinstance(rank, int):
            raise ValueError(
                f"rank is {tuple(rank)}, but {cls.__name__} has one rank; give one whole number"
            )
        return rank

    @abstractmethod
    def product(self, x: Tensor, layer: int, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        """The product x (Q_l + Delta_l)^T + bias, (..., out), in the dtype and on the device of x.

        Delta_l is not made.

        Args:
            x: (..., in).
            layer: l.
            bias: (out,) or None.
            weight: Q_l.
        """

    @abstractmethod
    def delta(self, layer: int, rows: slice = _ALL_ROWS) -> Tensor:
        """Delta_l, (out, in) or some of its rows, float32, without gradients.

        It is for splitting and merging only.
        """

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Parameters that train; everything else in the module is frozen."""

    def trains(self) -> bool:
        """Whether any of its trainable parameters is not frozen."""
        return any(parameter.requires_grad for parameter in self.trained())

    @property
    def trained_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.trained())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the factors if floating-point parameters are saved as `dtype`."""
        total = 0
        for parameter in self.parameters():
            if parameter.is_floating_point():
                total += parameter.numel() * self.dtype.itemsize
            else:
                total += parameter.nbytes
        return total

    @torch.no_grad()
    def round_masters(self) -> None:
        """Round the float32 masters to `dtype`; the function of the model does not change."""
        for parameter in self.trained():
            parameter.copy_(parameter.to(self.dtype))

    def _without_autocast(self) -> AbstractContextManager[Any]:
        """A context in which autocast does not change the dtype of products of parameters."""
        device = next(self.parameters()).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    def rounded(self, parameter: Tensor) -> Tensor:
        """A trainable parameter rounded to `dtype`; the gradient passes through, rounded too."""
        return rounded_factor(parameter, self.dtype, parameter)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        packed = [
            name for name, tensor in self.named_parameters() if not tensor.is_floating_point()
        ]
        warn_of_other_bytes(self, packed, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        pack(self, packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device or a wider dtype.

        A narrower dtype is not followed: it would round the masters for good.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(moved.device)
            return moved

        return super()._apply(move, recurse)


class _Kept(NamedTuple):
    """Rounded factors, kept between forward passes over one token a sequence.

    Attributes:
        state: identity, place and version of the parameters that they were made from.
        values: copies of these parameters.
        up, down: rounded.
        layers: `up`, core and `down` of the layers so far; `up` and `down` are views.
    """

    state: tuple[tuple[int, int, int], ...]
    values: list[Tensor]
    up: Tensor
    down: Tensor
    layers: dict[int, tuple[Tensor, Tensor | None, Tensor]]


class LowRankFactors(Factors):
    """Factors with Delta_l = up . core_l . down.

    A layer may be served by a part of the components only; it overrides `served`.
    """

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self._kept: dict[tuple[torch.device, torch.dtype], _Kept] = {}
        self._last_layer = -1  # of those that the kept factors served

    @abstractmethod
    def down(self) -> Tensor:
        """(s, in), differentiable in the trainable parameters, not yet rounded."""

    def core(self, layer: int) -> Tensor | None:
        """core_l, (r, s), or its diagonal (r,); None stands for the identity.

        It is differentiable in the trainable parameters, which are rounded in it.
        """
        return None

    @abstractmethod
    def up(self) -> Tensor:
        """(out, r), differentiable in the trainable parameters, not yet rounded."""

    def served(self, layer: int, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of `up` and rows of `down` that serve a layer, as views; all by default."""
        return up, down

    def product(self, x: Tensor, layer: int, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        decodes = x.dim() > 1 and x.shape[-2] == 1
        up, core, down, rounding = self.operands(layer, x.device, x.dtype, keep=decodes)
        return adapted_product(x, up, core, down, bias, weight, rounding)

    def operands(
        self, layer: int, device: torch.device, dtype: torch.dtype, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, torch.dtype]:
        """`up` and `down` as they serve a layer, its core between them, and the dtype that `up` and
        `down` are yet to be rounded to.

        With `keep`, in a pass without gradients, they come rounded, in the given dtype and on the
        given device, and are kept for the other layers and the next tokens: in decoding, rounding
        them in every layer takes as long as their products. They are made again when a parameter
        has changed. Writes past autograd's version counter (`parameter.data.copy_`) are found by
        the values at the beginning of every pass: the layers of a stack are in the order of a pass,
        so an earlier layer, or the same one, begins the next.

        Args:
            layer: l.
            device, dtype: of the input.
            keep: whether the pass is over one token a sequence.
        """
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling or not keep:
            if not compiling:
                self._kept.clear()
            up, down = self.served(layer, self.up(), self.down())
            return up, self._core_without_autocast(layer), down, self.dtype
        if layer <= self._last_layer and not self._are_as_kept():
            self._kept.clear()
        self._last_layer = layer
        kept = self._kept_factors(device, dtype)
        if layer not in kept.layers:
            core = self._core_without_autocast(layer)
            core = None if core is None else core.detach().to(device, dtype)
            up, down = self.served(layer, kept.up, kept.down)
            kept.layers[layer] = (up, core, down)
        return *kept.layers[layer], dtype

    def _own_parameters(self) -> list[Tensor]:
        return [p for p in direct_parameters(self).values() if p is not None]

    def _are_as_kept(self) -> bool:
        """Whether the parameters have the values that the kept factors were made from."""
        parameters = self._own_parameters()
        return all(
            len(parameters) == len(kept.values) and all(map(_equal, parameters, kept.values))
            for kept in self._kept.values()
        )

    def _kept_factors(self, device: torch.device, dtype: torch.dtype) -> _Kept:
        parameters = self._own_parameters()
        state = tuple(
            (id(parameter), parameter.data_ptr(), version_counter(parameter))
            for parameter in parameters
        )
        kept = self._kept.get((device, dtype))
        if kept is None or kept.state != state:
            up = self.up().detach().to(self.dtype).to(device, dtype)
            down = self.down().detach().to(self.dtype).to(device, dtype)
            # Column-major: this layout is faster to read for few tokens.
            up = up.T.contiguous().T
            values = [parameter.detach().clone() for parameter in parameters]
            kept = _Kept(state, values, up, down, {})
            self._kept[device, dtype] = kept
        return kept

    def _core_without_autocast(self, layer: int) -> Tensor | None:
        with self._without_autocast():
            return self.core(layer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept.clear()
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def pair(self, layer: int, rows: slice = _ALL_ROWS) -> tuple[Tensor, Tensor]:
        """Two float32 factors of Delta_l: up . core_l, (out, s) or some of its rows, and down."""
        up, down = self.served(layer, self.up()[rows], self.down())
        up = up.to(self.dtype).to(torch.float32)
        down = down.to(self.dtype).to(torch.float32)
        core = self.core(layer)
        return times(up, None if core is None else core.to(torch.float32)), down

    def delta(self, layer: int, rows: slice = _ALL_ROWS) -> Tensor:
        left, right = self.pair(layer, rows)
        return left @ right


def unit_rows(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows of length one in the shape of `like`, float64, on the generator's device."""
    rows = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=1)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, also in their dtype and device."""
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def factor_dtype(settings: Settings) -> torch.dtype:
    """The dtype that factors are rounded to."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[settings.factor_dtype]


class Fit(NamedTuple):
    """Factors fitted to a stack.

    Attributes:
        factors: of the method's class.
        energy: how much of the stack's squared norm they take away, under the metric if there is
            one.
        starts: subspaces that a fit to nearly the same stack may start from.
    """

    factors: Factors
    energy: float
    starts: list[Tensor]


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not train; integers are packed bytes."""
    if not tensor.is_floating_point():
        return packed_parameter(tensor)
    return nn.Parameter(tensor, requires_grad=False)


def stored_factors(factors: Factors) -> dict[str, Tensor]:
    """The parameters as a checkpoint holds them: as `dtype` if that loses nothing."""
    return {
        name: stored(parameter.detach(), factors.dtype)
        for name, parameter in factors.named_parameters()
    }


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor as `dtype` if that loses nothing, else as it is."""
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor
