"""The format of every stack: given, or with bits="auto" two, three or four bits for each.

With bits="auto" every stack is split and rounded in NF2, NF3 and NF4 as it would be stored, and its
error is measured: of the outputs if calibrated, else of the weights, both squared and summed over
the layers, relative to the stack's error in NF4 rounded plainly. The formats with the least sum of
these errors are taken whose mean of bits a weight is at most `target_bits`. The mean is the
report's (`prepare`): bytes of packed weights, scales and factors over all quantized weights.

The errors are relative because stacks differ in the size of their outputs by much more than in
their worth. On SmolLM2 a few huge inputs give down_proj two thirds of the whole error. With a mean
of 3.3 bits the least sum of absolute errors puts gate_proj in two bits in its favour, and the sum
of errors relative to E||x W_l^T||^2 puts down_proj in two bits: both have a larger KL divergence to
the 16-bit model than three bits everywhere.

One format a stack within a limit of bytes is the multiple-choice knapsack problem. Greedy choices
by error per byte can miss its optimum, since stacks are few and large. `least_error` finds it.
"""

from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from qrefta.choices import AUTO_BITS, MIXED_TYPES, QuantType, bits_of
from qrefta.config.rank import Rank
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.methods import METHODS
from qrefta.model.weights import Weights
from qrefta.nn.factors import factor_dtype
from qrefta.nn.quantized import QuantFormat
from qrefta.split.moments import Moments
from qrefta.split.residual import Split
from qrefta.split.stack_split import StackSplit


class Formats(NamedTuple):
    """Formats of all stacks.

    Attributes:
        quant_types: by stack, in their order; None with 16 bits.
        splits: of stacks that were split in their format to measure its error; they need no second
            split.
    """

    quant_types: list[QuantType | None]
    splits: dict[LayerStack, Split]


def choose_formats(
    stacks: Sequence[LayerStack],
    ranks: Sequence[Rank],
    weights_of: Callable[[LayerStack], Weights],
    settings: Settings,
    moments: Moments | None,
    show: bool,
) -> Formats:
    """The format of every stack; with bits="auto" the formats of least error within `target_bits`.

    The choice is optimal for the sum of the measured errors. It may stay below the target by less
    than the smallest step that would fit, and by more only if more bits would not lower the error.
    Takes the time of preparing the model three times.

    Args:
        stacks: all stacks of the model.
        ranks: of every stack; 0 for a stack without factors.
        weights_of: the weights of a stack.
        settings: of the whole model.
        moments: second moments of the layers' inputs.
        show: print the choice, and a progress bar.

    Raises:
        ValueError: if `target_bits` is below the bits of the smallest formats, or above the bits of
            the largest.
    """
    if settings.bits != AUTO_BITS:
        return Formats([_given(settings)] * len(stacks), {})
    sizes = _sizes(stacks, ranks, settings)
    limit = _limit(stacks, sizes, settings)
    errors: list[list[float]] = []
    splits: list[list[Split]] = []
    measured = tqdm(
        zip(stacks, ranks, strict=True),
        total=len(stacks),
        desc="Choosing bits",
        unit="stack",
        disable=not show,
        delay=2.0,
    )
    for stack, rank in measured:
        weights = weights_of(stack)
        tried = [
            StackSplit(stack, weights, settings.of_stack(kind), rank, moments)
            for kind in MIXED_TYPES
        ]
        errors.append(_errors(tried))
        splits.append([split.result for split in tried])
    chosen = least_error(sizes, errors, limit)
    quant_types: list[QuantType | None] = [MIXED_TYPES[choice] for choice in chosen]
    kept = {
        stack: tried[choice] for stack, tried, choice in zip(stacks, splits, chosen, strict=True)
    }
    if show:
        tqdm.write(_listed(stacks, sizes, chosen))
    return Formats(quant_types, kept)


def formats_without_weights(
    stacks: Sequence[LayerStack], ranks: Sequence[Rank], settings: Settings
) -> list[QuantType | None]:
    """Formats as large as those of `choose_formats` at most: with bits="auto" the largest sum of
    bytes within `target_bits`.

    Raises:
        ValueError: as `choose_formats`.
    """
    if settings.bits != AUTO_BITS:
        return [_given(settings)] * len(stacks)
    sizes = _sizes(stacks, ranks, settings)
    savings = [[-float(size) for size in of_stack] for of_stack in sizes]
    chosen = least_error(sizes, savings, _limit(stacks, sizes, settings))
    return [MIXED_TYPES[choice] for choice in chosen]


def least_error(
    sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int
) -> tuple[int, ...]:
    """One choice for every stack with the least sum of errors and a sum of sizes within a limit.

    The optimum, by dynamic programming: for each number of first stacks it keeps the choices that
    no other beats in both sums. Of equal errors the smaller size is taken, then the earlier choice.
    The kept choices are at most as many as there are different sums of sizes, which for a model are
    few: stacks have common factors in their sizes.

    Args:
        sizes: of every stack by choice, positive.
        errors: of every stack by choice.
        limit: at least the sum of the smallest sizes.
    """
    kept: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for stack_sizes, stack_errors in zip(sizes, errors, strict=True):
        grown = sorted(
            (size + more, error + worse, (*choices, choice))
            for size, error, choices in kept
            for choice, (more, worse) in enumerate(zip(stack_sizes, stack_errors, strict=True))
            if size + more <= limit
        )
        kept = []
        for state in grown:  # by size
            if not kept or state[1] < kept[-1][1]:
                kept.append(state)
    assert kept, "the limit was checked"
    return kept[-1][2]


def _given(settings: Settings) -> QuantType | None:
    return None if settings.bits == 16 else settings.quant_type


def _sizes(
    stacks: Sequence[LayerStack], ranks: Sequence[Rank], settings: Settings
) -> list[list[int]]:
    """Bytes of every stack in every format, with its factors, as its report will state them."""
    return [
        [_stack_bytes(stack, rank, settings.of_stack(kind)) for kind in MIXED_TYPES]
        for stack, rank in zip(stacks, ranks, strict=True)
    ]


def _stack_bytes(stack: LayerStack, rank: Rank, settings: Settings) -> int:
    fmt = QuantFormat.of(settings)
    assert fmt is not None, "these settings are of few bits"
    layers, out_features, in_features = stack.shape
    size = layers * sum(fmt.packed_sizes(out_features * in_features).values())
    if not rank:
        return size
    with torch.device("meta"):
        factors = METHODS[settings.method](*stack.shape, rank, factor_dtype(settings))
    return size + factors.stored_bytes


def _limit(stacks: Sequence[LayerStack], sizes: Sequence[Sequence[int]], settings: Settings) -> int:
    """The largest number of bytes within `target_bits`.

    Raises:
        ValueError: if it is not between the sums of the smallest and the largest formats.
    """
    assert settings.target_bits is not None, "settings with bits auto have a target"
    weights = _weights(stacks)
    limit = floor(settings.target_bits * weights / 8)
    smallest = sum(min(of_stack) for of_stack in sizes)
    largest = sum(max(of_stack) for of_stack in sizes)
    if smallest <= limit <= largest:
        return limit
    low = ceil(8000 * smallest / weights) / 1000
    high = floor(8000 * largest / weights) / 1000
    fix = (
        "A smaller rank, larger blocks or double_quant lower both"
        if limit < smallest
        else ("For more give bits=4, with a smaller block_size or double_quant=False")
    )
    raise ValueError(
        f"target_bits is {settings.target_bits}; with the scales and factors of these settings it "
        f"must be between {low} ({MIXED_TYPES[0].upper()} everywhere) and {high} "
        f"({MIXED_TYPES[-1].upper()} everywhere). {fix}"
    )


def _weights(stacks: Sequence[LayerStack]) -> int:
    return sum(stack.layers * stack.out_features * stack.in_features for stack in stacks)


def _errors(tried: Sequence[StackSplit]) -> list[float]:
    """The errors of a stack in every format as stored, relative to plain rounding in the last."""
    reports = [split.measured() for split in tried]
    if reports[-1].output_baseline is None:
        errors = [report.residual_error for report in reports]
        unit = reports[-1].baseline_error
    else:
        errors = [report.output_error or 0.0 for report in reports]
        unit = reports[-1].output_baseline
    return [error / unit if unit else 0.0 for error in errors]


def _listed(
    stacks: Sequence[LayerStack], sizes: Sequence[Sequence[int]], chosen: Sequence[int]
) -> str:
    total = sum(of_stack[choice] for of_stack, choice in zip(sizes, chosen, strict=True))
    listed = ", ".join(
        f"{stack.name} {bits_of(MIXED_TYPES[choice])}"
        for stack, choice in zip(stacks, chosen, strict=True)
    )
    return f"Bits: {listed}; {8 * total / _weights(stacks):.3f} bits a weight"
