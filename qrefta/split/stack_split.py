"""One stack: split, handed out layer by layer as it is to be stored, and its row in the report."""

from collections.abc import Iterator

from torch import Tensor

from qrefta.config import StackRow
from qrefta.hf_config import QReftaConfig
from qrefta.linalg.tsvd import squared_norm
from qrefta.model.stacks import LayerStack, Weights
from qrefta.nn.factors import Rank
from qrefta.nn.quantized import Packed
from qrefta.split.calibrate import Moments, output_error, shared_metric
from qrefta.split.residual import Split, SplitLayer, split_layers, split_stack


class StackSplit:
    """A stack split, and the sums over its layers as they are handed out.

    Args:
        stack, weights: what to split.
        config: how.
        rank: as the method takes it; 0 quantizes only.
        moments: of the layers' inputs, which then weight the split and measure the output error.
    """

    def __init__(
        self,
        stack: LayerStack,
        weights: Weights,
        config: QReftaConfig,
        rank: Rank,
        moments: Moments | None,
    ) -> None:
        self.stack, self.weights, self.config, self.moments = stack, weights, config, moments
        metric = (
            None if moments is None or not rank else shared_metric(moments, stack, weights.device)
        )
        self.split = split_stack(weights, config, rank, metric) if rank else Split()
        self.residual_error = self.baseline_error = self.norm = self.principal_norm = 0.0
        self.output_error = self.output_baseline = 0.0
        self.bytes = 0 if self.split.factors is None else self.split.factors.stored_bytes

    def residuals(self) -> Iterator[Packed | Tensor]:
        """What to store of each layer, in order: packed, or dense float32 with 16 bits."""
        for index, layer in enumerate(split_layers(self.weights, self.split, self.config)):
            self._add(index, layer)
            yield layer.residual

    def _add(self, index: int, layer: SplitLayer) -> None:
        self.residual_error += squared_norm(layer.error)
        self.baseline_error += squared_norm(layer.whole_error)
        self.norm += layer.norm
        self.principal_norm += layer.principal_norm
        parts = layer.residual if isinstance(layer.residual, Packed) else (layer.residual,)
        self.bytes += sum(part.nbytes for part in parts if part is not None)
        if self.moments is not None and self.config.format is not None:
            moment = self.moments.of(self.stack.place(index)[0])
            self.output_error += output_error(layer.error, moment)
            self.output_baseline += output_error(layer.whole_error, moment)

    def row(self) -> StackRow:
        """The stack's row, once all residuals were handed out."""
        stack, factors, measured = self.stack, self.split.factors, self.moments is not None
        return StackRow(
            stack=stack.name,
            modules=list(stack.modules),
            transposed=stack.transposed,
            experts=stack.experts,
            layers=stack.layers,
            shape=[stack.out_features, stack.in_features],
            rank=0
            if factors is None
            else list(factors.rank)
            if isinstance(factors.rank, tuple)
            else factors.rank,
            slice_ranks=[0] * stack.layers if factors is None else factors.slice_ranks,
            transform=self.config.transform if factors is not None and factors.fits else None,
            quant_type=self.config.quant_type if self.config.format else None,
            baseline_error=self.baseline_error,
            residual_error=self.residual_error,
            ratio=_ratio(self.residual_error, self.baseline_error),
            principal_energy=self.principal_norm / self.norm if self.norm else 0.0,
            bytes=self.bytes,
            bits_per_weight=8
            * self.bytes
            / (stack.layers * stack.out_features * stack.in_features),
            output_error=self.output_error if measured else None,
            output_ratio=_ratio(self.output_error, self.output_baseline) if measured else None,
        )


def _ratio(error: float, baseline: float) -> float:
    return error / baseline if baseline else 1.0
