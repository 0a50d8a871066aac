"""The one equation that every tensor method shares, and the bank that owns its trained numbers.

For the K layers of a stack:

    W_l ~ dequant(Q_l) + Delta_l        Delta_l = up . core_l . down

`down` (s x in) and `up` (out x r) are shared by all K layers; `core_l` (r x s, or diagonal) belongs to its layer. A
method is one final subclass: of `LowRankFactors`, which says what these three are and which numbers in them train, or
of `Factors` itself where Delta_l has another form and its own product with the tokens.

Trained numbers are bf16 values: the forward pass, `delta`, merging and export see them rounded to `dtype`. Their
Parameters hold float32 masters, because at a learning rate of 2e-4 an optimizer step is smaller than half a bf16 step
for most entries and plain AdamW would lose it; the masters make every optimizer right, at two bytes more an entry
(10 MB for Llama-3-8B at R = 64). Masters that are bf16 values are stored as bf16.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from qrefta._compat.torch import direct_parameters, version_counter
from qrefta.linalg.tsvd import TRANSFORMS, Slices
from qrefta.nn.product import adapted_product, rounded_factor
from qrefta.nn.quantized import Packed, QuantFormat

Rank = int | Sequence[int]

_ALL = slice(None)


class _Rounded(NamedTuple):
    """Rounded factors and the cores used so far, and which state of the Parameters they were made from."""

    state: tuple[tuple[int, int], ...]
    up: Tensor
    down: Tensor
    cores: dict[int, Tensor]


class Factors(nn.Module, ABC):
    """Trained and frozen tensors of one stack.

    Args:
        layers: K, linears in the stack.
        out_features, in_features: shape of each weight.
        rank: r, width of the factors; its meaning is the method's.
        dtype: what the trained values are rounded to wherever they are used; float32 or wider: not rounded.

    Attributes:
        fits: whether `fit` takes a principal part out of the weights. If not, Delta is 0 at the start, the weights are
            quantized whole, and there is nothing to refine; `draw` makes what is random.
        transforms: mode-3 transforms that `fit` takes, the default first.
        slice_ranks: components of each transformed slice, summing to the rank; set by `fit`, not stored.
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
        self.slice_ranks: list[int] = []

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
        """The factors nearest to a stack, given by its transformed slices; without `fits`, factors whose Delta is 0.

        Args:
            slices: of the stack under `transform`.
            rank: r.
            transform: mode-3 transform, (layers, slices), float64.
            dtype: see the class.
            seed: of what is random.
            starts: the subspaces of an earlier fit to nearly the same stack; then one pass is enough.
        """
        with slices.device:
            factors = cls(*slices.shape, rank, dtype)
        with torch.no_grad():
            factors.draw(torch.Generator().manual_seed(seed))
        return Fit(factors, energy=0.0, starts=[])

    def draw(self, generator: torch.Generator) -> None:
        """Fill the random Parameters with values of `dtype`; the generator is the CPU's, whatever the device."""
        raise NotImplementedError(
            f"{type(self).__name__} neither fits its stack nor says how it starts."
        )

    @classmethod
    @abstractmethod
    def largest_rank(cls, layers: int, out_features: int, in_features: int) -> int:
        """The largest rank that a stack of this shape takes."""

    @classmethod
    def rank_of(cls, layers: int, out_features: int, in_features: int, rank: Rank) -> Rank:
        """What a stack of this shape gets where `rank` was asked for.

        Raises:
            ValueError: if the method has another number of ranks.
        """
        if not isinstance(rank, int):
            raise ValueError(
                f"ranks is {list(rank)}, but {cls.__name__} has one rank; give it as rank"
            )
        return rank

    @abstractmethod
    def product(
        self, x: Tensor, layer: int, bias: Tensor | None, packed: Packed, fmt: QuantFormat | None
    ) -> Tensor:
        """The product x (Q_l + Delta_l)^T + bias, (..., out), without making Delta_l, in x's dtype and on its device.

        Args:
            x: (..., in).
            layer: l.
            bias: (out,) or None.
            packed, fmt: Q_l and its format; None: 16 bits.
        """

    @abstractmethod
    def delta(self, layer: int, rows: slice = _ALL) -> Tensor:
        """Delta_l, (out, in) or some rows of it, float32, no gradients: for splitting and merging only."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Parameters that train; everything else in the module is frozen."""

    def _own_precision(self) -> AbstractContextManager[Any]:
        """What small products among the Parameters are made in: their dtype, whatever autocast says."""
        kind = next(self.parameters()).device.type
        active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.autocast(kind, enabled=False) if active else nullcontext()

    def _seen(self, trained: Tensor) -> Tensor:
        """Trained numbers as they are seen: rounded, with the gradient passing through."""
        return rounded_factor(trained, self.dtype, trained)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, or to a wider dtype; a narrower one would round the masters for good."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return (
                moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)
            )

        return super()._apply(move, recurse)

    @property
    def trained_count(self) -> int:
        return sum(parameter.numel() for parameter in self.trained())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the factors with all but raw bytes stored as `dtype`."""
        return sum(
            p.numel() * self.dtype.itemsize if p.is_floating_point() else p.nbytes
            for p in self.parameters()
        )

    @torch.no_grad()
    def round_masters(self) -> None:
        """Round the float32 masters to `dtype`; the function that the model computes does not change."""
        for parameter in self.trained():
            parameter.copy_(parameter.to(self.dtype))


class LowRankFactors(Factors):
    """Factors with Delta_l = up . core_l . down."""

    def __init__(
        self, layers: int, out_features: int, in_features: int, rank: Rank, dtype: torch.dtype
    ) -> None:
        super().__init__(layers, out_features, in_features, rank, dtype)
        self._settled = False  # between eval() and the next forward pass that records gradients
        self._rounded: dict[tuple[torch.device, torch.dtype], _Rounded] = {}

    @abstractmethod
    def down(self) -> Tensor:
        """(s, in), differentiable in the trained numbers, not yet rounded."""

    @abstractmethod
    def core(self, layer: int) -> Tensor:
        """core_l, (r, s), or its diagonal (r,); differentiable in the trained numbers, which are rounded in it."""

    @abstractmethod
    def up(self) -> Tensor:
        """(out, r), differentiable in the trained numbers, not yet rounded."""

    def product(
        self, x: Tensor, layer: int, bias: Tensor | None, packed: Packed, fmt: QuantFormat | None
    ) -> Tensor:
        up, core, down, rounding = self.operands(layer, x.device, x.dtype)
        shape = (self.out_features, self.in_features)
        return adapted_product(x, up, core, down, bias, packed, fmt, shape, rounding)

    def operands(
        self, layer: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        """`up`, `core`, `down` and the dtype to round `up` and `down` to, to compute with a device and a dtype.

        After `eval()` and without gradients they come rounded, in that dtype and on that device, and are kept for the
        other layers and the next tokens: in decoding, rounding them in every layer takes as long as their products.
        They are made anew when a Parameter has changed. An optimizer that writes past autograd's version counter does
        not show there; so what is kept is dropped by `train()`, `eval()` and every pass that records gradients.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._settled:
            if self._settled and not torch.compiler.is_compiling():
                self._forget(settled=False)
            return self.up(), self._core(layer), self.down(), self.dtype
        state = tuple(
            (id(parameter), version_counter(parameter))
            for parameter in direct_parameters(self).values()
        )
        kept = self._rounded.get((device, dtype))
        if kept is None or kept.state != state:
            up, down = (
                factor.detach().to(self.dtype).to(device, dtype)
                for factor in (self.up(), self.down())
            )
            up = up.T.contiguous().T  # the layout that is faster to read for few tokens
            kept = self._rounded[device, dtype] = _Rounded(state, up, down, {})
        if layer not in kept.cores:
            kept.cores[layer] = self._core(layer).detach().to(device, dtype)
        return kept.up, kept.cores[layer], kept.down, dtype

    def _core(self, layer: int) -> Tensor:
        with self._own_precision():
            return self.core(layer)

    def train(self, mode: bool = True) -> Self:
        self._forget(settled=not mode)
        return super().train(mode)

    def _forget(self, settled: bool) -> None:
        self._settled = settled
        self._rounded.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._rounded.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._rounded.clear()  # FSDP2 gathers what was loaded past the version counter
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def pair(self, layer: int, rows: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Two float32 factors of Delta_l: up . core_l, (out, s) or some rows of it, and down, (s, in)."""
        up, down = (
            factor.to(self.dtype).to(torch.float32) for factor in (self.up()[rows], self.down())
        )
        core = self.core(layer).to(torch.float32)
        return up * core if core.dim() == 1 else up @ core, down

    def delta(self, layer: int, rows: slice = _ALL) -> Tensor:
        left, right = self.pair(layer, rows)
        return left @ right


def frozen(tensor: Tensor) -> nn.Parameter:
    """A Parameter that does not train."""
    return nn.Parameter(tensor, requires_grad=False)


def stored_factors(factors: Factors) -> dict[str, Tensor]:
    """The parameters as a checkpoint holds them: those that are values of `dtype` as `dtype`, which loses nothing."""
    return {
        name: stored(parameter.detach(), factors.dtype)
        for name, parameter in factors.named_parameters()
    }


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor as `dtype` if that loses nothing, else as it is."""
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor


class Fit(NamedTuple):
    """Factors fitted to a stack.

    Attributes:
        factors: with the method's class.
        energy: how much of the stack's squared norm (under the metric, if there is one) they take away.
        starts: subspaces that a fit to nearly the same stack may start from.
    """

    factors: Factors
    energy: float
    starts: list[Tensor]


class FactorBank(nn.ModuleDict):
    """All factors of a model, by stack key; registered once, at the model's root, as `BANK`.

    Layers look their factors up in the bank and do not register them: shared parameters under K names would be
    refused by save_pretrained and sharded K times by FSDP2.
    """

    # transformers hands its checkpointing function to every module that has this attribute
    gradient_checkpointing = False

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        raise AttributeError("A factor bank checkpoints nothing.")

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        options = getattr(function, "keywords", None)  # none where checkpointing is switched off
        if (
            options is not None and options.get("use_reentrant") is not False
        ):  # torch's own default is True
            raise ValueError(
                "Gradient checkpointing with use_reentrant=True silently gives the shared factors wrong gradients when "
                'several processes train. Use the default, or gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


BANK = "qrefta_factors"
