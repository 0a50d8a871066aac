"""The way from dense weights to a prepared model: one loop over stacks, from a source to a sink.

A source is a model in memory or a checkpoint on disk; a sink is a model in memory or a folder. Both
preparing in memory and preparing out of core run this loop, so they give the same bits.
"""

from typing import Protocol

from tqdm.auto import tqdm

from qrefta._compat.torch import cpu_float32_defaults
from qrefta.choices import QuantType
from qrefta.config.rank import Rank, RankBudget
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.model.stacks import select_stacks
from qrefta.model.weights import Weights
from qrefta.split.allocate import choose_ranks, given_ranks
from qrefta.split.formats import choose_formats, formats_without_weights
from qrefta.split.moments import Moments
from qrefta.split.rounding import warn_of_tokens
from qrefta.split.stack_split import StackSplit

PROGRESS_DELAY_S = 2.0


class Source(Protocol):
    """Dense weights.

    Attributes:
        stacks: all stacks, in the order of the model's modules.
    """

    stacks: list[LayerStack]

    def weights(self, stack: LayerStack) -> Weights:
        """The weights of a stack, read a few rows at a time."""
        ...


class Sink(Protocol):
    """Where prepared stacks go.

    Attributes:
        ranks: rank of every stack, from an interrupted run; None before the ranks are chosen.
        quant_types: format of every stack, or None with 16 bits; None before they are chosen.
        reports: of the stacks that are complete, in order.
    """

    ranks: list[Rank] | None
    quant_types: list[QuantType | None] | None
    reports: list[StackReport]

    def begin(self, ranks: list[Rank], quant_types: list[QuantType | None]) -> None:
        """Take the rank and the format of every stack; nothing is refused after this."""
        ...

    def write(self, split: StackSplit) -> None:
        """Store the factors and residuals of the next stack, and add its report."""
        ...


def choices_without_weights(
    stacks: list[LayerStack], settings: Settings
) -> tuple[list[Rank], list[QuantType | None]]:
    """The rank and the format of every stack, as large as `split_stacks` makes them at most.

    Raises:
        ValueError: as `split_stacks`; and if a rank depends on the weights.
    """
    given = given_ranks(select_stacks(stacks, settings.target_modules), settings)
    ranks = [given.get(stack, 0) for stack in stacks]
    return ranks, formats_without_weights(stacks, ranks, settings)


def check_choices(stacks: list[LayerStack], settings: Settings) -> None:
    """Refuse target modules, a rank or target bits that no weights are needed to refuse.

    Raises:
        ValueError: as `split_stacks`.
    """
    if isinstance(settings.rank, RankBudget) and settings.weighs_error:
        select_stacks(stacks, settings.target_modules)
    else:
        choices_without_weights(stacks, settings)


def split_stacks(
    source: Source, sink: Sink, settings: Settings, moments: Moments | None, progress: bool
) -> None:
    """Split every stack of a source that the sink does not hold yet.

    A default device or dtype of torch, which is for the user's models, has no effect.

    Raises:
        ValueError: if `target_modules` matches no stack, or a rank, a budget or `target_bits`
            cannot be met.
    """
    targets = select_stacks(source.stacks, settings.target_modules)
    splits = {}
    if moments is not None:
        warn_of_tokens(moments, source.stacks, settings)
    if sink.ranks is None:
        weights = [source.weights(stack) for stack in targets]
        with cpu_float32_defaults():
            allocation = choose_ranks(targets, weights, settings, moments, progress)
            ranks = [allocation.ranks.get(stack, 0) for stack in source.stacks]
            formats = choose_formats(
                source.stacks, ranks, source.weights, settings, moments, progress
            )
        splits = allocation.splits | formats.splits
        sink.begin(ranks, formats.quant_types)
    assert sink.ranks is not None, "a sink keeps the ranks that it was given"
    assert sink.quant_types is not None, "and the formats"
    done = len(sink.reports)
    bar = tqdm(
        total=len(source.stacks),
        initial=done,
        desc="Preparing",
        unit="stack",
        disable=not progress,
        delay=PROGRESS_DELAY_S,
    )
    with bar, cpu_float32_defaults():
        chosen = zip(source.stacks, sink.ranks, sink.quant_types, strict=True)
        for stack, rank, quant_type in list(chosen)[done:]:
            bar.set_postfix_str(stack.name, refresh=False)
            own = settings.of_stack(quant_type)
            weights = source.weights(stack)
            sink.write(StackSplit(stack, weights, own, rank, moments, splits.pop(stack, None)))
            bar.update()
