"""The errors that each method leaves of one stack in one format."""

from bisect import bisect_right
from dataclasses import replace
from functools import cached_property, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.peers.splits import loftq, pissa, qera, small_block, small_block_bits
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import Metric, output_error
from qrefta.methods import METHODS
from qrefta.methods.craft import CRAFT
from qrefta.methods.refta import ReFTA
from qrefta.model.weights import Weights
from qrefta.nn.factors import Factors, Fit
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.moments import Moments, shared_metric
from qrefta.split.residual import ROUNDS, one_shot, split_stack

STARTS = {
    "one shot": 0,
    "refined": ROUNDS,
    "calibrated": ROUNDS,
}  # rounds of each
PAPER = "lsm3"  # the transform for calibration and the nuclear norm
SMALL_BLOCKS = {"smaller block": 32, "smaller block, 8-bit scales": 8}  # bits of a scale
LOFTQ_ROUNDS = 5


class Cell(NamedTuple):
    """The fields that identify a row.

    Only refta has a `transform`; refta and craft have a `start`. `rank` counts refta's components
    per stack; the other methods get equally many parameters or bytes.
    """

    text: str
    samples: int
    max_length: int
    model: str
    stack: str
    quant_type: str
    method: str
    start: str | None
    transform: str | None
    rank: int


class Sums(NamedTuple):
    """Errors of a stack: ||E_l||_F^2 by layer, its sum, and the sums of ||E_l||_* and E||x
    E_l^T||^2.
    """

    layers: list[float]
    error: float
    nuclear: float
    output: float


class StackErrors:
    """The errors of every method on one stack in one format.

    Args:
        stack, weights, fmt: the stack, its weights, and the 4-bit format.
        calibration, test: second moments of the inputs.
        fits: fits of the unquantized weights, shared by all formats of the stack.
    """

    def __init__(
        self,
        stack: LayerStack,
        weights: Weights,
        fmt: QuantFormat,
        calibration: Moments,
        test: Moments,
        fits: dict[tuple[Any, ...], Fit],
    ) -> None:
        self.weights = weights
        self.fmt = fmt
        self.layers = [weights.layer(index) for index in range(weights.shape[0])]
        self.moments = [test.of(path) for path in stack.modules]
        self.metric = shared_metric(calibration, stack)
        self.whole = torch.stack([weight - rounded(weight, fmt) for weight in self.layers])
        self.baseline = self.sums(self.whole)
        self.stack = stack
        self.calibration = calibration
        self.fits = fits

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metric of every layer's inputs."""
        alone = [replace(self.stack, modules=(path,)) for path in self.stack.modules]
        return [shared_metric(self.calibration, layer) for layer in alone]

    def row(self, cell: Cell) -> dict[str, Any]:
        """Errors of a method, relative to quantizing whole weights, and its bits per weight."""
        errors, factor_bytes, refine = self.errors(cell)
        nuclear = cell.method in ("pissa", "loftq") or (
            cell.transform == PAPER and cell.quant_type == "nf4"
        )
        found = self.sums(errors, nuclear)
        baseline = self.baseline
        numel = self.whole.numel()
        bits = 4 + 32 / self.fmt.block_size + 8 * factor_bytes / numel
        if cell.method in SMALL_BLOCKS:
            bits = small_block_bits(self.small_block(cell), SMALL_BLOCKS[cell.method])
        return {
            "shape": list(self.weights.shape),
            "block_size": self.small_block(cell)
            if cell.method in SMALL_BLOCKS
            else self.fmt.block_size,
            "refine": refine,
            "baseline_error": baseline.error,
            "residual_error": found.error,
            "ratio": found.error / baseline.error,
            "layer_ratios": [
                error / whole for error, whole in zip(found.layers, baseline.layers, strict=True)
            ],
            "nuclear_baseline": baseline.nuclear,
            "nuclear_error": found.nuclear if nuclear else None,
            "nuclear_reduction": 1 - found.nuclear / baseline.nuclear if nuclear else None,
            "output_baseline": baseline.output,
            "output_error": found.output,
            "output_ratio": found.output / baseline.output,
            "bits_per_weight": bits,
        }

    def errors(self, cell: Cell) -> tuple[Tensor, int, int]:
        """W_l - Ŵ_l of all layers, (layers, out, in); bytes of 16-bit parameters; rounds."""
        layers, out_features, in_features = self.weights.shape
        pair_bytes = 2 * cell.rank * (out_features + in_features)
        if cell.rank == 0:
            return self.whole, 0, 0
        if cell.method in METHODS:
            return self.split(cell)
        if cell.method in SMALL_BLOCKS:
            block = self.small_block(cell)
            scale_bits = SMALL_BLOCKS[cell.method]
            return torch.stack([w - small_block(w, block, scale_bits) for w in self.layers]), 0, 0
        ranks = [cell.rank // layers + (index < cell.rank % layers) for index in range(layers)]
        if cell.method == "qera":
            pairs = map(qera, self.whole, ranks, self.metrics)
            left = [error - up @ down for error, (up, down) in zip(self.whole, pairs, strict=True)]
            return torch.stack(left), pair_bytes, 0
        split = (
            partial(loftq, rounds=LOFTQ_ROUNDS, fmt=self.fmt) if cell.method == "loftq" else pissa
        )
        errors = []
        for weight, rank in zip(self.layers, ranks, strict=True):
            up, down, rest = split(weight, rank)
            errors.append(weight - rounded(rest, self.fmt) - up @ down)
        return torch.stack(errors), pair_bytes, LOFTQ_ROUNDS if cell.method == "loftq" else 0

    def split(self, cell: Cell) -> tuple[Tensor, int, int]:
        rank = cell.rank if cell.method == "refta" else self.craft_rank(cell)
        config = Settings(
            method=cell.method,
            transform=cell.transform or PAPER,
            quant_type=cell.quant_type,
            refine=STARTS[cell.start],
            scales="absmax",  # as in the papers that are compared
            rounding="nearest",
        )
        metric = self.metric if cell.start == "calibrated" else None
        key = (cell.method, cell.transform, rank, metric is None)
        if key not in self.fits:
            self.fits[key] = one_shot(self.weights, config, rank, metric)
        split = split_stack(self.weights, config, rank, metric, first=self.fits[key])
        errors = [
            weight
            - rounded(weight - split.base.delta(index), self.fmt)
            - split.factors.delta(index)
            for index, weight in enumerate(self.layers)
        ]
        return torch.stack(errors), split.factors.stored_bytes, STARTS[cell.start]

    def craft_rank(self, cell: Cell) -> int:
        """The largest rank over outputs and inputs whose factors take at most refta's bytes."""
        layers, out_features, in_features = self.weights.shape

        def stored_bytes(method: type[Factors], rank: int) -> int:
            with torch.device("meta"):
                return method(layers, out_features, in_features, rank, torch.bfloat16).stored_bytes

        allowed = stored_bytes(ReFTA, cell.rank)
        ranks = range(1, CRAFT.largest_rank(layers, out_features, in_features) + 1)
        return max(bisect_right(ranks, allowed, key=partial(stored_bytes, CRAFT)), 1)

    def small_block(self, cell: Cell) -> int:
        """The smallest block whose scales take at most the bits of refta's factors and scales."""
        layers, out_features, in_features = self.weights.shape
        factors = (
            16 * cell.rank * (out_features + in_features) / (layers * out_features * in_features)
        )
        return ceil(
            (small_block_bits(1, SMALL_BLOCKS[cell.method]) - 4)
            / (32 / self.fmt.block_size + factors)
        )

    def sums(self, errors: Tensor, nuclear: bool = True) -> Sums:
        outputs = [
            output_error(error, moment) for error, moment in zip(errors, self.moments, strict=True)
        ]
        norms = sum(map(nuclear_norm, errors)) if nuclear else 0.0
        layers = torch.linalg.vector_norm(errors, dim=2).double().square().sum(1).tolist()
        return Sums(layers, sum(layers), norms, sum(outputs))


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values, from the smaller Gram matrix in float64."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return torch.linalg.eigvalsh((tall.mT @ tall).double()).clamp(min=0).sqrt().sum().item()
