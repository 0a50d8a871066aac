"""Stacks in memory, as the functions that read them by blocks of rows take them."""

from qrefta.methods.refta import ReFTA
from qrefta.tensor import Slices, mix, transform_matrix


def blocks_of(stack):
    """One block, the whole stack."""
    return lambda: [(slice(0, stack.shape[1]), stack)]


def fit_refta(stack, rank, transform, dtype):
    """Factors of a stack (layers, out, in) under a transform by its name."""
    U = transform_matrix(blocks_of(stack), len(stack), transform)
    slices = Slices(blocks_of(mix(stack, U)), tuple(stack.shape), stack.device)
    return ReFTA.fit(slices, rank, U, dtype, seed=0).factors
