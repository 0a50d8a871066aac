"""Rank by need: ranks for all stacks from a budget of bytes or an error to reach.

A component of a stack with tensor singular value s takes s^2 of the weights' squared norm out of what is quantized.
Quantization error is close to proportional to the norm quantized, so the component removes about c s^2 of it, with c
the stack's own ratio of quantization error to norm, and costs the factors' bytes for one component. Components of all
stacks are taken in order of error removed per byte: the best choice for that model of the error, since the values of
each stack fall. Refinement removes more, by a factor that differs little between stacks: for `error_ratio` the splits
are made and measured, and the factor corrected, until the ratio reached is just under the one asked for.
"""

from bisect import bisect_right
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from qrefta.config import StackRow
from qrefta.hf_config import QReftaConfig
from qrefta.linalg.tsvd import squared_norm
from qrefta.methods import METHODS
from qrefta.methods.refta import ReFTA
from qrefta.model.stacks import LayerStack, Weights
from qrefta.nn.factors import Factors, Rank
from qrefta.nn.quantized import rounded
from qrefta.split.calibrate import Moments
from qrefta.split.residual import tensor_values
from qrefta.split.stack_split import StackSplit

_DEPTH = 3  # values that are computed at first, relative to sharing the budget evenly
_FIRST_DEPTH = 64  # values of every stack that are computed at first, without a budget
_TRIALS = 6  # measured allocations at most
_CAUTION = 0.995  # of the gain over the model that a trial measured, so that the next one errs below the error asked
_CLOSE = 0.98  # share of the error asked for from which on an allocation is good enough


def choose_ranks(
    targets: list[LayerStack],
    weights: list[Weights],
    config: QReftaConfig,
    moments: Moments | None,
    show: bool,
) -> dict[LayerStack, Rank]:
    """The rank of every target stack; `show` prints what "auto" chose.

    Raises:
        ValueError: if a rank is beyond a stack's, or the budget or the error cannot be kept.
    """
    if config.rank != "auto":
        return _given_ranks(targets, config)

    def measure(ranks: list[int]) -> float:
        return _reached(
            [
                _measured(*pair, config, rank, moments)
                for *pair, rank in zip(targets, weights, ranks, strict=True)
            ]
        )

    if config.budget_mb is not None:
        ranks = _ranks_for_budget(targets, weights, config, config.budget_mb * 1e6)
    else:
        ranks = _ranks_for_error(targets, weights, config, config.error_ratio, measure)
    chosen = dict(zip(targets, ranks, strict=True))
    if show:
        tqdm.write("Ranks: " + ", ".join(f"{stack.name} {rank}" for stack, rank in chosen.items()))
    return chosen


def _ranks_for_budget(
    stacks: list[LayerStack], weights: list[Weights], config: QReftaConfig, budget_bytes: float
) -> list[int]:
    """Ranks whose factors take at most `budget_bytes` in all, with the most quantization error removed.

    Every stack gets one component at least.

    Raises:
        ValueError: if the budget does not hold one component of every stack.
    """
    return _Spectra(stacks, weights, config).ranks(budget_bytes)


def _ranks_for_error(
    stacks: list[LayerStack],
    weights: list[Weights],
    config: QReftaConfig,
    error_ratio: float,
    measure: Callable[[list[int]], float],
) -> list[int]:
    """The cheapest ranks found whose measured ratio is at most `error_ratio`.

    Args:
        stacks, weights: the targets, and theirs.
        config: of the split.
        error_ratio: error over that of quantizing whole weights, over all these stacks.
        measure: splits the stacks with given ranks and returns the ratio reached.

    Raises:
        ValueError: if the largest ranks do not reach it.
    """
    spectra = _Spectra(stacks, weights, config)
    gain, best, ranks = 1.0, None, None
    for _ in range(_TRIALS):
        before, ranks = ranks, spectra.ranks_for(1 - (1 - error_ratio) / gain)
        if ranks == before:
            break
        reached = measure(ranks)
        if reached <= error_ratio and (best is None or sum(ranks) < sum(best)):
            best = ranks
        if _CLOSE * error_ratio <= reached <= error_ratio:
            return ranks
        if reached > error_ratio and spectra.complete(ranks):
            raise ValueError(
                f"error_ratio is {error_ratio}, but the largest ranks reach only {reached:.3f}; ask for no less"
            )
        gain = _CAUTION * (1 - reached) / (1 - spectra.predicted(ranks))
    return best or spectra.largest


class _Spectra:
    """Tensor singular values of stacks, computed as deep as they are asked for."""

    def __init__(
        self, stacks: list[LayerStack], weights: list[Weights], config: QReftaConfig
    ) -> None:
        self.stacks, self.weights, self.config = stacks, weights, config
        self.largest = [ReFTA.largest_rank(*stack.shape) for stack in stacks]
        element = config.torch_factor_dtype.itemsize
        self.costs = [element * (s.out_features + s.in_features) + 4 * s.layers for s in stacks]
        errors, norms = zip(*(_error_and_norm(own, config) for own in weights), strict=True)
        self.noise = [
            error / norm if norm else 0.0 for error, norm in zip(errors, norms, strict=True)
        ]
        self.whole = sum(errors) or 1.0
        self.values: list[list[float]] = [[] for _ in stacks]

    def ranks(self, budget_bytes: float) -> list[int]:
        """Components in order of error removed per byte, until no further one fits."""
        least = sum(self.costs)
        if budget_bytes < least:
            raise ValueError(
                f"budget_mb is {budget_bytes / 1e6:.3f}, but one component of each of the {len(self.stacks)} stacks "
                f"takes {least / 1e6:.3f} MB; give more, or fewer target_modules"
            )
        self._deepen_all(int(_DEPTH * budget_bytes / least))
        while True:
            left = budget_bytes - least
            ranks = [1] * len(self.stacks)
            for index in self._by_worth():
                if self.costs[index] <= left:
                    left -= self.costs[index]
                    ranks[index] += 1
            if not self._cut_short(ranks):
                return ranks

    def ranks_for(self, ratio: float) -> list[int]:
        """The first components in order of error removed per byte whose predicted ratio is at most `ratio`."""
        self._deepen_all(_FIRST_DEPTH)
        while True:
            ranks = [1] * len(self.stacks)
            reached = self.predicted(ranks)
            for index in self._by_worth():
                if reached <= ratio:
                    break
                reached -= self._removed(index, ranks[index])
                ranks[index] += 1
            if not self._cut_short(ranks):
                return ranks

    def predicted(self, ranks: list[int]) -> float:
        """The model's ratio of errors: what the principal parts take out of the norm, they take out of the error."""
        removed = [self._removed(index, c) for index, rank in enumerate(ranks) for c in range(rank)]
        return 1 - sum(removed)

    def complete(self, ranks: list[int]) -> bool:
        return ranks == self.largest

    def _removed(self, index: int, component: int) -> float:
        """Share of the whole error that one component removes."""
        return self.noise[index] * self.values[index][component] ** 2 / self.whole

    def _by_worth(self) -> list[int]:
        """The stack of every component after the first ones, in order of error removed per byte."""
        entries = [
            (-self._removed(index, component) / self.costs[index], index)
            for index, values in enumerate(self.values)
            for component in range(1, len(values))
        ]
        return [index for _, index in sorted(entries)]

    def _cut_short(self, ranks: list[int]) -> bool:
        """Whether a stack got all of its values known so far and may want more, which are then computed."""
        ended = [i for i, r in enumerate(ranks) if r == len(self.values[i]) < self.largest[i]]
        for index in ended:
            self._deepen(index, 2 * ranks[index])
        return bool(ended)

    def _deepen_all(self, rank: int) -> None:
        for index in range(len(self.stacks)):
            self._deepen(index, rank)

    def _deepen(self, index: int, rank: int) -> None:
        rank = min(rank, self.largest[index])
        if len(self.values[index]) < rank:
            self.values[index] = tensor_values(self.weights[index], self.config, rank).tolist()


def _measured(
    stack: LayerStack, weights: Weights, config: QReftaConfig, rank: int, moments: Moments | None
) -> StackRow:
    """The row that a stack would get."""
    split = StackSplit(stack, weights, config, rank, moments)
    for _ in split.residuals():
        pass
    return split.row()


def _reached(rows: list[StackRow]) -> float:
    """Error over that of quantizing whole weights: of the outputs if it was measured, else of the weights."""
    if rows[0].output_error is not None:
        error = sum(row.output_error for row in rows)
        whole = sum(row.output_error / row.output_ratio for row in rows if row.output_ratio)
    else:
        error, whole = (
            sum(getattr(row, key) for row in rows) for key in ("residual_error", "baseline_error")
        )
    return error / whole if whole else 1.0


def _given_ranks(targets: list[LayerStack], config: QReftaConfig) -> dict[LayerStack, Rank]:
    """The same rank for all, or the largest one that trains at most `config.trained_params` numbers."""
    method = METHODS[config.method]
    if config.trained_params is not None:
        return _ranks_for_params(targets, method, config.trained_params)
    rank = config.ranks or config.rank
    smallest = min(targets, key=lambda stack: method.largest_rank(*stack.shape))
    largest = method.largest_rank(*smallest.shape)
    if config.ranks is None and rank > largest:
        layers, out_features, in_features = smallest.shape
        raise ValueError(
            f"rank is {rank}, but for {smallest.name} ({layers} layers of {out_features} x {in_features}) and method "
            f"{config.method} the largest allowed rank is {largest}: give less, or leave it out of target_modules"
        )
    return {stack: method.rank_of(*stack.shape, rank) for stack in targets}


def _ranks_for_params(
    targets: list[LayerStack], method: type[Factors], most: int
) -> dict[LayerStack, Rank]:
    """Ranks from one number, capped where a stack takes less."""

    def ranks(rank: int) -> list[Rank]:
        return [
            method.rank_of(*stack.shape, min(rank, method.largest_rank(*stack.shape)))
            for stack in targets
        ]

    def count(rank: int) -> int:
        with torch.device("meta"):
            found = [
                method(*stack.shape, own, torch.float32).trained_count
                for stack, own in zip(targets, ranks(rank), strict=True)
            ]
        return sum(found)

    if count(1) > most:
        raise ValueError(
            f"trained_params is {most}, but rank 1 of the {len(targets)} stacks trains {count(1)} numbers; give more, "
            "or fewer target_modules"
        )
    largest = max(method.largest_rank(*stack.shape) for stack in targets)
    rank = bisect_right(range(1, largest + 1), most, key=count)
    return dict(zip(targets, ranks(rank), strict=True))


def _error_and_norm(weights: Weights, config: QReftaConfig) -> tuple[float, float]:
    """||W - Q(W)||_F^2 and ||W||_F^2 of a stack."""
    error = norm = 0.0
    for layer in range(weights.shape[0]):
        weight = weights.layer(layer)
        norm += squared_norm(weight)
        error += squared_norm(weight - rounded(weight, config.format))
    return error, norm
