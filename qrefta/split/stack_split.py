"""One stack: split, handed out layer by layer as it is to be stored, and measured on the way."""

from collections.abc import Iterator
from typing import Self

import torch

from qrefta.config.rank import Rank
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import output_error
from qrefta.linalg.tsvd import squared_norm
from qrefta.model.weights import Weights
from qrefta.nn.factors import Factors
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import FrozenWeight, QuantFormat
from qrefta.split.moments import Moments, shared_metric
from qrefta.split.residual import Split, SplitLayer, split_layer, split_stack
from qrefta.split.rounding import StackRounding


class StackSplit:
    """A stack split, with sums over its layers as they are handed out.

    Args:
        stack, weights: the stack to split.
        settings: of the split.
        rank: as the method takes it; 0 quantizes only.
        moments: second moments of the layers' inputs; they weight the split and measure the output
            error.
        split: the result of `split_stack` for the same arguments, if it was made before.
        original: the weights that errors of weights are measured against; default: `weights`.
    """

    def __init__(
        self,
        stack: LayerStack,
        weights: Weights,
        settings: Settings,
        rank: Rank,
        moments: Moments | None,
        split: Split | None = None,
        original: Weights | None = None,
    ) -> None:
        self.stack = stack
        self.original = original
        self.weights = weights
        self.settings = settings
        reached = moments is not None and any(map(moments.reached, stack.modules))
        self.moments = moments if reached else None
        self.rounding = StackRounding(settings, stack, self.moments, weights.device)
        self.result = split or self._make(rank)
        self._clear()

    def with_weights(self, weights: Weights, moments: Moments) -> Self:
        """The same split, whose residuals are taken from other weights: they are rounded, and the
        outputs are compared with theirs.
        """
        own = self.original or self.weights
        return type(self)(self.stack, weights, self.settings, 0, moments, self.result, own)

    @property
    def factors(self) -> Factors | None:
        """The factors of the stack; None if it is only quantized."""
        return self.result.factors

    def residuals(self) -> Iterator[FrozenWeight]:
        """The frozen weight of each layer, in order; dense float32 with 16 bits."""
        self._clear()
        for index in range(self.stack.layers):
            yield self.residual(index)

    def residual(self, index: int) -> FrozenWeight:
        """The frozen weight of one layer, which the report then counts: ask for each layer once."""
        layer = split_layer(self.weights, self.result, self.settings, self.rounding, index)
        self._add(index, layer)
        return layer.residual

    def measured(self) -> StackReport:
        """The report, after rounding all layers; the residuals are not kept."""
        for _ in self.residuals():
            pass
        return self.report()

    def report(self) -> StackReport:
        """The report of the stack, once all residuals were handed out."""
        factors = self.factors
        fitted = factors is not None and factors.fits
        measured = self.moments is not None
        return StackReport(
            stack=self.stack,
            rank=0 if factors is None else factors.rank,
            slice_ranks=(0,) * self.stack.layers if factors is None else tuple(factors.slice_ranks),
            transform=self.settings.transform if fitted else None,
            quant_type=None if self.settings.bits == 16 else self.settings.quant_type,
            baseline_error=self.baseline_error,
            residual_error=self.residual_error,
            principal_energy=self.principal_norm / self.norm if self.norm else 0.0,
            bytes=self.bytes,
            output_error=self.output_error if measured else None,
            output_baseline=self.output_baseline if measured else None,
        )

    def _make(self, rank: Rank) -> Split:
        if not rank:
            return Split()
        metric = None
        if self.moments is not None:
            metric = shared_metric(self.moments, self.stack, self.weights.device)
        return split_stack(self.weights, self.settings, rank, metric, self.rounding)

    def _clear(self) -> None:
        self.residual_error = 0.0
        self.baseline_error = 0.0
        self.norm = 0.0
        self.principal_norm = 0.0
        self.output_error = 0.0
        self.output_baseline = 0.0
        self.bytes = 0 if self.factors is None else self.factors.stored_bytes

    def _add(self, index: int, layer: SplitLayer) -> None:
        self._add_weight_errors(index, layer)
        self.principal_norm += layer.principal_norm
        self.bytes += layer.residual.nbytes
        if self.moments is not None and QuantFormat.of(self.settings) is not None:
            path, _ = self.stack.module_and_expert(index)
            moment = self.moments.of(path)
            self.output_error += output_error(layer.error, moment)
            self.output_baseline += output_error(layer.whole_error, moment)

    def _add_weight_errors(self, index: int, layer: SplitLayer) -> None:
        error, whole_error, norm = layer.error, layer.whole_error, layer.norm
        if self.original is not None:
            fmt = QuantFormat.of(self.settings)
            assert fmt is not None, "other weights are for rounding"
            weight = self.original.layer(index)
            whole_error = weight - rounded(weight, fmt)
            norm = squared_norm(weight)
            error = weight.sub_(layer.residual.dequantize(torch.float32))
            if self.factors is not None:
                error.sub_(self.factors.delta(index))
        self.residual_error += squared_norm(error)
        self.baseline_error += squared_norm(whole_error)
        self.norm += norm
