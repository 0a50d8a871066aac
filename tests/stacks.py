"""Stacks in memory, as the functions that read them by blocks of rows take them."""

from contextlib import contextmanager
from typing import NamedTuple

import pytest

from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import mix, t_svd, transform_matrix
from qrefta.methods.refta import ReFTA
from qrefta.model.weights import Weights
from qrefta.nn.factors import Factors
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import DenseWeight
from qrefta.split.folder_sink import FolderSink
from qrefta.split.residual import Split, split_layers, split_stack


def blocks_of(stack):
    """One block, the whole stack."""
    return lambda: [(slice(0, stack.shape[1]), stack)]


def fit_refta(stack, rank, transform, dtype):
    """Factors of a stack (layers, out, in) under a transform by its name."""
    U = transform_of(stack, transform)
    return ReFTA.fit(slices_of(stack, U), rank, U, dtype, seed=0).factors


def transform_of(stack, name):
    """U of a stack in memory, (layers, slices)."""
    return transform_matrix(blocks_of(stack), len(stack), name)


def slices_of(stack, U, rows=None, metric=None):
    """Transformed slices in blocks of `rows` rows (None: one block)."""
    mixed = mix(stack, U)
    step = rows or stack.shape[1]

    def blocks():
        return [
            (slice(at, at + step), mixed[:, at : at + step])
            for at in range(0, stack.shape[1], step)
        ]

    return Slices(blocks, tuple(stack.shape), stack.device, metric)


def svd_of(stack, U, rank):
    """The leading components of a stack in memory."""
    return t_svd(slices_of(stack, U), rank, seed=0)[0]


def stored_in(matrix, fmt):
    """A matrix as a frozen weight: in 4 bits, or dense if there is no format."""
    return DenseWeight(matrix) if fmt is None else quantize(matrix, fmt)


def split_and_error(stack, config, rank=None):
    """A stack in memory split: factors, residuals, and the error that its layers state."""
    weights = Weights.of(stack)
    rank = config.rank if rank is None else rank
    split = split_stack(weights, config, rank) if rank else Split()
    layers = list(split_layers(weights, split, config))
    error = sum(layer.error.double().square().sum().item() for layer in layers)
    return Splitted(split.factors, [layer.residual for layer in layers], error)


class Splitted(NamedTuple):
    factors: Factors | None
    residuals: list
    error: float


@contextmanager
def full_disk():
    """Out of core, the disk is full after two stacks: what runs within ends in that error."""
    real = FolderSink.write

    def fail(sink, split):
        if len(sink.reports) == 2:
            raise OSError(28, "No space left on device")
        real(sink, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSink, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            yield
