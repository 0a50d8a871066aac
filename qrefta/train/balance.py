"""Batches with about equally many tokens, for rows that are joined without padding.

The step with the most tokens sets the peak memory. At random, a batch of eight rows has up to twice
the mean number of tokens. Here the rows of `RUN` batches are dealt out, so that every batch has
long and short ones.
"""

import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler

from qrefta._compat.transformers import SampledTrainer

RUN = 50  # batches that are balanced together


class BalancedSampler(Sampler[int]):
    """All rows in an order that changes with the epoch; batches of it have similar sums of lengths.

    Rows that fill no batch come last.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = generator.sample(range(len(self.lengths)), len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        step = RUN * self.batch_size
        for start in range(0, whole, step):
            batches = self._dealt(order[start : min(start + step, whole)])
            for batch in generator.sample(batches, len(batches)):
                yield from batch
        yield from order[whole:]

    def _dealt(self, rows: list[int]) -> list[list[int]]:
        """Batches of the rows; in every round the longest row goes to the batch with the fewest
        tokens.
        """
        count = len(rows) // self.batch_size
        batches: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        ordered = sorted(rows, key=self.lengths.__getitem__, reverse=True)
        for start in range(0, len(ordered), count):
            fewest_first = sorted(range(count), key=tokens.__getitem__)
            for batch, row in zip(fewest_first, ordered[start : start + count], strict=True):
                batches[batch].append(row)
                tokens[batch] += self.lengths[row]
        return batches


class BalancedBatches(SampledTrainer):
    """A Trainer that takes a `BalancedSampler` where rows are joined; put it before TRL's
    SFTTrainer in the bases of a class.
    """

    def sampler_of(self, rows: Any) -> BalancedSampler | None:
        args: Any = self.args
        random_order = args.train_sampling_strategy == "random"
        joins = args.padding_free and not args.packing
        if not (joins and random_order and isinstance(rows, Dataset)):
            return None
        seed = args.seed if args.data_seed is None else args.data_seed
        return BalancedSampler(row_lengths(rows), args.train_batch_size, seed)


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of every row."""
    lengths: list[int] = []
    tables: Any = rows.select_columns("input_ids").with_format("arrow")
    for table in tables.iter(batch_size=1000):
        for chunk in table["input_ids"].chunks:
            lengths += chunk.value_lengths().to_pylist()
    return lengths
