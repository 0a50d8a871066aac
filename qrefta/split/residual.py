"""A stack of weights -> factors and a frozen residual for each layer: W_l ~ dequant(Q_l) + Delta_l.

A stack is read in blocks of rows of all its layers and is never needed as a whole. A split keeps
the factors that were subtracted before quantizing: Q_l = quantize(W_l - Delta_l) can be computed
again from them, a layer or a few rows at a time. So refinement stores only factors between its
passes, and the same code serves weights in memory and in files, on a CPU and on a GPU.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.config.rank import Rank
from qrefta.config.settings import Settings
from qrefta.linalg.metric import Metric
from qrefta.linalg.slices import Blocks, Slices
from qrefta.linalg.tsvd import mix, squared_norm, t_svd, transform_matrix
from qrefta.methods import METHODS
from qrefta.model.weights import Weights
from qrefta.nn.factors import Factors, Fit, factor_dtype
from qrefta.nn.quantize import Rounding, quantize, rounded
from qrefta.nn.quantized import DenseWeight, FrozenWeight, QuantFormat
from qrefta.split.rounding import StackRounding

# On MiniLM five rounds bring two thirds of the gain of twenty.
ROUNDS = 5
# Before error feedback. On SmolLM2 further rounds change the KL divergence less than its standard
# error.
ROUNDS_OF_CORRECTION = 1
# Tolerance of the fits in these rounds. The singular values of a quantization error differ little:
# on SmolLM2 the KL divergence after four passes is as low as after ten.
_TOLERANCE_OF_CORRECTION = 0.2


class Split(NamedTuple):
    """A split stack: Q_l = quantize(W_l - base.delta(l)), and W_l ~ dequant(Q_l) +
    factors.delta(l).

    Attributes:
        factors: None if the stack is only quantized.
        base: `factors`, or after a last refit the factors of the round before; None: unsplit
            weights.
    """

    factors: Factors | None = None
    base: Factors | None = None


class SplitLayer(NamedTuple):
    """One layer as stored, and the matrices that its errors are computed from.

    Attributes:
        residual: Q_l in 4 bits; dense float32 with 16 bits.
        error: W_l - dequant(Q_l) - Delta_l, (out, in), float32; zero with 16 bits.
        whole_error: W_l - dequant(quantize(W_l)), the error of the unsplit weight, rounded plainly.
        norm, principal_norm: ||W_l||_F^2 and ||Delta_l||_F^2 at the start.
    """

    residual: FrozenWeight
    error: Tensor
    whole_error: Tensor
    norm: float
    principal_norm: float


def one_shot(weights: Weights, settings: Settings, rank: Rank, metric: Metric | None = None) -> Fit:
    """The factors nearest to unsplit weights, whatever the format: the paper's split, and the start
    of refinement.
    """
    return _UnsplitStack(weights, settings).fit(rank, metric)


def split_stack(
    weights: Weights,
    settings: Settings,
    rank: Rank,
    metric: Metric | None = None,
    rounding: StackRounding | None = None,
    first: Fit | None = None,
) -> Split:
    """Factors of a stack, and the factors that its residuals are computed with.

    The principal part of W comes first. Each of the `settings.refine` rounds then refits the
    factors to W - dequant(Q) and quantizes W - Delta again, under the transform of W throughout:
    with a fixed transform, a refit cannot raise the error (up to the rounding of the factors). A
    last refit follows. A refit starts from the subspaces of the refit before and makes one pass.
    Without a metric the state with the lowest squared error is returned; with a metric, the last
    state.

    If the residual is stored with error feedback, the rounds start from the unsplit weights: the
    first fit is the best correction of their quantization error (QERA, Zhang et al. 2024, with
    factors that layers share). Error feedback leaves a principal part nothing to gain. The rounds
    take nearest levels, and no refit follows the feedback: it would destroy the compensation
    between the columns of Q.

    Args:
        weights: finite.
        settings: method, transform, format, rounds and seed.
        rank: as the method takes it.
        metric: of the inputs, for an activation-aware split.
        rounding: of the residuals; default: as the settings say, without moments.
        first: the result of `one_shot` for the same arguments, if it was computed before.
    """
    rounding = rounding or StackRounding(settings)
    fmt = QuantFormat.of(settings)
    whole = _UnsplitStack(weights, settings)
    if rounding.feeds_back and settings.refine != 0 and METHODS[settings.method].fits:
        return _correction(whole, rank, metric, rounding)
    fit = first or whole.fit(rank, metric)
    best = Split(fit.factors, fit.factors)
    rounds = ROUNDS if settings.refine is None else settings.refine
    if fmt is None or rounds == 0 or not fit.factors.fits:
        return best
    best_error: float | None = None
    for _ in range(rounds + 1):
        base = fit.factors
        target = _Target(whole, base, fmt, rounding)
        slices = Slices(target.blocks, weights.shape, weights.device, metric)
        fit = _fit(slices, settings, rank, whole.transform, fit.starts)
        if best_error is None:
            best_error = target.error
        error = target.norm - fit.energy
        if metric is not None or error < best_error:
            best = Split(fit.factors, base)
            best_error = error
    return best


def _correction(
    whole: "_UnsplitStack", rank: Rank, metric: Metric | None, rounding: StackRounding
) -> Split:
    """Factors that correct the error of quantizing what they leave over, for error feedback."""
    weights, settings = whole.weights, whole.settings
    fmt = QuantFormat.of(settings)
    assert fmt is not None, "16 bits have no error to correct"
    factors: Factors | None = None
    starts: list[Tensor] | None = None
    for _ in range(ROUNDS_OF_CORRECTION if settings.refine is None else settings.refine):
        target = _Target(whole, factors, fmt, rounding)
        blocks = target.blocks if starts else _kept(target.blocks, weights)  # a refit is one pass
        slices = Slices(blocks, weights.shape, weights.device, metric, _TOLERANCE_OF_CORRECTION)
        fit = _fit(slices, settings, rank, whole.transform, starts)
        factors = fit.factors
        starts = fit.starts
    return Split(factors, factors)


def tensor_values(weights: Weights, settings: Settings, rank: int) -> Tensor:
    """The `rank` largest tensor singular values of a stack, (rank,), largest first."""
    slices = Slices(_UnsplitStack(weights, settings).blocks(), weights.shape, weights.device)
    svd, _ = t_svd(slices, rank, settings.seed)
    return svd.values


def split_layers(
    weights: Weights, split: Split, settings: Settings, rounding: StackRounding | None = None
) -> Iterator[SplitLayer]:
    """The layers of a stack as stored, in order."""
    rounding = rounding or StackRounding(settings)
    for index in range(weights.shape[0]):
        yield split_layer(weights, split, settings, rounding, index)


def split_layer(
    weights: Weights, split: Split, settings: Settings, rounding: StackRounding, index: int
) -> SplitLayer:
    """A layer of a stack as stored.

    Memory: about five layers in float32; with error feedback, two second moments more.
    """
    fmt = QuantFormat.of(settings)
    weight = weights.layer(index)
    if fmt is None:
        return _dense_layer(weight, split.factors, index)
    rounding_of_layer = rounding.stored(index)
    if split.factors is None or split.base is None or not split.factors.fits:
        return _quantized_layer(weight, fmt, rounding_of_layer)
    return _residual_layer(weight, split.factors, split.base, index, fmt, rounding_of_layer)


def _dense_layer(weight: Tensor, factors: Factors | None, index: int) -> SplitLayer:
    norm = squared_norm(weight)
    principal_norm = 0.0
    if factors is not None:
        delta = factors.delta(index)
        principal_norm = squared_norm(delta)
        weight = weight - delta
    zero = torch.zeros((), dtype=torch.float32)
    return SplitLayer(DenseWeight(weight), zero, zero, norm, principal_norm)


def _quantized_layer(weight: Tensor, fmt: QuantFormat, rounding: Rounding) -> SplitLayer:
    """A layer without factors, or whose Delta is zero at the start."""
    norm = squared_norm(weight)
    residual = quantize(weight, fmt, rounding)
    whole_error = weight - rounded(weight, fmt)
    error = weight.sub_(residual.dequantize(torch.float32))
    return SplitLayer(residual, error, whole_error, norm, 0.0)


def _residual_layer(
    weight: Tensor,
    factors: Factors,
    base: Factors,
    index: int,
    fmt: QuantFormat,
    rounding: Rounding,
) -> SplitLayer:
    norm = squared_norm(weight)
    delta = factors.delta(index)
    principal_norm = squared_norm(delta)
    whole_error = weight - rounded(weight, fmt)
    residual = quantize(weight - base.delta(index), fmt, rounding)
    error = weight.sub_(residual.dequantize(torch.float32)).sub_(delta)
    return SplitLayer(residual, error, whole_error, norm, principal_norm)


class _UnsplitStack:
    """An unsplit stack under its transform.

    Attributes:
        rows: rows of every layer in a block.
        transform: U, (layers, slices), float64.
        mixing: U in float32, the dtype of the work.
    """

    def __init__(self, weights: Weights, settings: Settings) -> None:
        self.weights = weights
        self.settings = settings
        self.rows = _rows_per_block(weights, QuantFormat.of(settings))
        # A method that does not fit its stack needs no transform; the identity costs no pass.
        transform = settings.transform if METHODS[settings.method].fits else "identity"
        self.transform = transform_matrix(
            lambda: _read(weights, self.rows), weights.shape[0], transform
        )
        self.mixing = self.transform.to(weights.device, torch.float32)

    def fit(self, rank: Rank, metric: Metric | None) -> Fit:
        """The nearest factors."""
        slices = Slices(self.blocks(), self.weights.shape, self.weights.device, metric)
        return _fit(slices, self.settings, rank, self.transform, None)

    def blocks(self) -> Blocks:
        """Passes over the transformed slices: kept in memory if that is allowed, else computed in
        each pass.
        """
        return _kept(self._mixed, self.weights)

    def _mixed(self) -> Iterator[tuple[slice, Tensor]]:
        return ((rows, mix(block, self.mixing)) for rows, block in _read(self.weights, self.rows))


class _Target:
    """W - dequant(quantize(W - Delta)), the stack that a refit approximates.

    Args:
        whole: the unsplit stack W.
        base: the factors of Delta; None: Delta is zero.
        fmt: of the quantized rest.
        rounding: of the stack.

    Attributes:
        norm: its squared norm, after a pass over `blocks`.
        error: sum_l ||W_l - Delta_l - dequant(Q_l)||_F^2 before the refit, after a pass.
    """

    def __init__(
        self, whole: _UnsplitStack, base: Factors | None, fmt: QuantFormat, rounding: StackRounding
    ) -> None:
        self._whole = whole
        self._base = base
        self._fmt = fmt
        self._roundings = [rounding.nearest(layer) for layer in range(whole.weights.shape[0])]
        self.norm = 0.0
        self.error = 0.0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """A pass over the transformed slices."""
        self.norm = 0.0
        self.error = 0.0
        for rows, block in _read(self._whole.weights, self._whole.rows):
            for layer, weight in enumerate(block):
                delta = None if self._base is None else self._base.delta(layer, rows)
                rest = weight if delta is None else weight - delta
                weight.sub_(rounded(rest, self._fmt, self._roundings[layer]))
                self.norm += squared_norm(weight)
                if delta is not None:
                    self.error += squared_norm(delta.sub_(weight))
            yield rows, mix(block, self._whole.mixing)


def _fit(
    slices: Slices, settings: Settings, rank: Rank, transform: Tensor, starts: list[Tensor] | None
) -> Fit:
    method = METHODS[settings.method]
    return method.fit(slices, rank, transform, factor_dtype(settings), settings.seed, starts)


def _kept(blocks: Blocks, weights: Weights) -> Blocks:
    """The same passes, from memory if a copy of the stack is allowed there."""
    if not weights.keep:
        return blocks
    kept = list(blocks())
    return lambda: kept


def _read(weights: Weights, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """One pass over a stack: (rows, (layers, rows, in) of them)."""
    out_features = weights.shape[1]
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), weights.rows(start, stop)


def _rows_per_block(weights: Weights, fmt: QuantFormat | None) -> int:
    """Rows of every layer in a block, so many that quantizing a block gives the bits of quantizing
    the matrix.
    """
    layers, out_features, in_features = weights.shape
    together = 1 if fmt is None else fmt.block_size // math.gcd(in_features, fmt.block_size)
    rows = weights.block_bytes // (4 * layers * in_features)
    return min(max(rows // together, 1) * together, out_features)
