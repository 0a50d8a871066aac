"""Batches of joined rows: every row once, and sums of lengths that are alike."""

import random

import pytest
from datasets import Dataset

from qrefta.train.balance import RUN, BalancedSampler, row_lengths

LENGTHS = [int(16 + 496 * random.Random(row).random() ** 4) for row in range(8 * 3 * RUN + 5)]


def sums(order, size=8):
    return [
        sum(LENGTHS[row] for row in order[start : start + size])
        for start in range(0, len(order) // size * size, size)
    ]


def test_every_row_comes_once_and_the_largest_batch_is_near_the_mean():
    order = list(BalancedSampler(LENGTHS, 8, seed=0))
    assert sorted(order) == list(range(len(LENGTHS)))
    batches = sums(order)
    mean = sum(batches) / len(batches)
    assert max(batches) < 1.15 * mean
    at_random = random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS))
    assert max(sums(at_random)) > 1.7 * mean


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler = BalancedSampler(LENGTHS, 8, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    again = BalancedSampler(LENGTHS, 8, seed=0)
    again.set_epoch(1)
    assert list(again) == second
    assert list(BalancedSampler(LENGTHS, 8, seed=1)) != first


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
def test_few_rows_are_all_there(rows):
    sampler = BalancedSampler(LENGTHS[:rows], 8, seed=0)
    assert sorted(sampler) == list(range(rows))
    assert len(sampler) == rows


def test_lengths_follow_the_order_of_the_rows():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [], [4, 5]], "labels": [0, 0, 0, 0]})
    assert row_lengths(rows) == [1, 3, 0, 2]
    assert row_lengths(rows.select([3, 0])) == [2, 1]
