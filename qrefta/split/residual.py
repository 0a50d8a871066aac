"""A stack of weights -> trained factors and what the 4-bit residual is taken of: W_l ~ dequant(Q_l) + Delta_l.

A stack is read in blocks of rows of all its layers and never needed as a whole. What a split keeps of the quantized
side is the factors that were subtracted before quantizing: Q_l = quantize(W_l - Delta_l) can be made again from them, a
layer or a few rows at a time. So refinement stores nothing but factors between its passes, and the same code serves
weights in memory and in files, on a CPU and on a GPU.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.config import QReftaConfig
from qrefta.linalg.metric import Metric
from qrefta.linalg.slices import Blocks, Slices
from qrefta.linalg.tsvd import mix, squared_norm, t_svd, transform_matrix
from qrefta.methods import METHODS
from qrefta.model.stacks import Weights
from qrefta.nn.factors import Factors, Fit, Rank
from qrefta.nn.quantized import DenseWeight, FrozenWeight, QuantFormat, quantize, rounded


class Split(NamedTuple):
    """One stack, split: Q_l = quantize(W_l - base.delta(l)), and W_l ~ dequant(Q_l) + factors.delta(l).

    Attributes:
        factors: None where the stack is quantized only.
        base: `factors` themselves, or after a last refit the factors of the round before; None: whole weights.
    """

    factors: Factors | None = None
    base: Factors | None = None


class SplitLayer(NamedTuple):
    """One layer as stored: the residual in 4 bits (dense float32 with 16), and the matrices that errors are taken of.

    Attributes:
        residual: Q_l.
        error: W_l - dequant(Q_l) - Delta_l, (out, in), float32; zero with 16 bits.
        whole_error: W_l - dequant(quantize(W_l)): what quantizing the whole weight would leave.
        norm, principal_norm: ||W_l||_F^2 and ||Delta_l||_F^2, of the start.
    """

    residual: FrozenWeight
    error: Tensor
    whole_error: Tensor
    norm: float
    principal_norm: float


def one_shot(
    weights: Weights, config: QReftaConfig, rank: Rank, metric: Metric | None = None
) -> Fit:
    """The factors nearest to whole weights, whatever the format: the paper's split, and where refinement starts."""
    return _Whole(weights, config).fit(rank, metric)


def split_stack(
    weights: Weights,
    config: QReftaConfig,
    rank: Rank,
    metric: Metric | None = None,
    first: Fit | None = None,
) -> Split:
    """Factors of a stack, and the factors that its residuals are taken with.

    The principal part of W comes first. Each of the `config.refine` rounds then refits the factors to W - dequant(Q)
    and takes Q of W - Delta anew, under the transform of W throughout: with it fixed, a refit cannot raise the error
    (up to the factors' rounding). A last refit follows. A refit starts from the subspaces of the one before and makes
    one pass. Without a metric the best of all states is returned, by squared error; with one, the last.

    Args:
        weights: finite.
        config: method, transform, format, rounds and seed.
        rank: as the method takes it.
        metric: of the inputs, for an activation-aware split.
        first: what `one_shot` gives for the same arguments, where it was made already.
    """
    whole = _Whole(weights, config)
    found = first or whole.fit(rank, metric)
    best, best_error = Split(found.factors, found.factors), None
    refits = config.refine and config.format is not None and found.factors.fits
    for _ in range(config.refine + 1 if refits else 0):
        base = found.factors
        target = _Target(
            weights, whole.rows, base, whole.mixing, config.format, of_base=best_error is None
        )
        found = _fit(weights, config, rank, whole.transform, metric, target.blocks, found.starts)
        best_error = target.error if best_error is None else best_error
        error = target.norm - found.energy
        if metric is not None or error < best_error:
            best, best_error = Split(found.factors, base), error
    return best


def tensor_values(weights: Weights, config: QReftaConfig, rank: int) -> Tensor:
    """The `rank` largest tensor singular values of a stack, (rank,), largest first."""
    slices = Slices(_Whole(weights, config).blocks(), weights.shape, weights.device)
    return t_svd(slices, rank, config.seed)[0].values


def split_layers(weights: Weights, split: Split, config: QReftaConfig) -> Iterator[SplitLayer]:
    """The layers of a stack as stored, one after the other. Memory: about five layers in float32."""
    for index in range(weights.shape[0]):
        weight = weights.layer(index)
        norm, principal = squared_norm(weight), 0.0
        delta = None if split.factors is None else split.factors.delta(index)
        if delta is not None:
            principal = squared_norm(delta)
        if config.format is None:
            residual = weight if delta is None else weight - delta
            yield SplitLayer(
                DenseWeight(residual), torch.zeros(()), torch.zeros(()), norm, principal
            )
            continue
        if delta is None:
            residual = quantize(weight, config.format)
            error = weight.sub_(residual.dequantize(torch.float32))
            yield SplitLayer(residual, error, error, norm, principal)
            continue
        whole_error = weight - rounded(weight, config.format)
        residual = quantize(weight - split.base.delta(index), config.format)
        error = weight.sub_(residual.dequantize(torch.float32)).sub_(delta)
        yield SplitLayer(residual, error, whole_error, norm, principal)


class _Whole:
    """A stack as it is, under its transform.

    Attributes:
        rows: rows of every layer in a block.
        transform: U, (layers, slices), float64.
        mixing: the same in float32, where the work is done.
    """

    def __init__(self, weights: Weights, config: QReftaConfig) -> None:
        self.weights, self.config = weights, config
        self.rows = _rows_per_block(weights, config.format)
        transform = config.transform if METHODS[config.method].fits else "identity"  # costs no pass
        self.transform = transform_matrix(
            lambda: _read(weights, self.rows), weights.shape[0], transform
        )
        self.mixing = self.transform.to(weights.device, torch.float32)

    def fit(self, rank: Rank, metric: Metric | None) -> Fit:
        """The factors nearest to it."""
        return _fit(self.weights, self.config, rank, self.transform, metric, self.blocks(), None)

    def blocks(self) -> Blocks:
        """Passes over the transformed slices: kept in memory if that is allowed, or made anew in each."""
        if not self.weights.keep:
            return self._mixed
        blocks = list(self._mixed())
        return lambda: blocks

    def _mixed(self) -> Iterator[tuple[slice, Tensor]]:
        return ((where, mix(block, self.mixing)) for where, block in _read(self.weights, self.rows))


class _Target:
    """W - dequant(quantize(W - Delta)), the stack that a refit is made to, and its errors once a pass is over.

    Attributes:
        norm: its squared norm.
        error: sum_l ||W_l - Delta_l - dequant(Q_l)||_F^2, before the refit, if `of_base`.
    """

    def __init__(
        self,
        weights: Weights,
        rows: int,
        base: Factors,
        mixing: Tensor,
        fmt: QuantFormat,
        of_base: bool,
    ) -> None:
        self.weights, self.rows, self.base, self.mixing, self.fmt = weights, rows, base, mixing, fmt
        self.of_base = of_base

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        self.norm = self.error = 0.0
        for where, block in _read(self.weights, self.rows):
            for layer, weight in enumerate(block):
                delta = self.base.delta(layer, where)
                weight.sub_(rounded(weight - delta, self.fmt))
                self.norm += squared_norm(weight)
                if self.of_base:
                    self.error += squared_norm(delta.sub_(weight))
            yield where, mix(block, self.mixing)


def _fit(
    weights: Weights,
    config: QReftaConfig,
    rank: Rank,
    transform: Tensor,
    metric: Metric | None,
    blocks: Blocks,
    starts: list[Tensor] | None,
) -> Fit:
    slices = Slices(blocks, weights.shape, weights.device, metric)
    return METHODS[config.method].fit(
        slices, rank, transform, config.torch_factor_dtype, config.seed, starts
    )


def _read(weights: Weights, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """One pass over a stack: (rows, (layers, rows, in) of them)."""
    out_features = weights.shape[1]
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), weights.rows(start, stop)


def _rows_per_block(weights: Weights, fmt: QuantFormat | None) -> int:
    """Rows of every layer in a block: quantized alone they give what they give in the whole matrix."""
    layers, out_features, in_features = weights.shape
    together = 1 if fmt is None else fmt.block_size // math.gcd(in_features, fmt.block_size)
    rows = weights.block_bytes // (4 * layers * in_features)
    return min(max(rows // together, 1) * together, out_features)
