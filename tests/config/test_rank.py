"""Ranks: budgets, text of the command line, sizes in bytes."""

import numpy as np
import pytest

from qrefta.config.rank import RankBudget, parse_rank
from qrefta.config.settings import Settings
from qrefta.config.sizes import parse_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got nothing; give exactly one of bytes, error_ratio and trainable_parameters"),
        ({"bytes": 1, "error_ratio": 0.5}, "give exactly one"),
        ({"bytes": "8 apples"}, "RankBudget bytes is '8 apples'"),
        ({"bytes": 0}, "RankBudget bytes is 0"),
        ({"error_ratio": 1.5}, "error_ratio is 1.5; .* at most 1"),
        ({"error_ratio": -1}, "must be a positive number"),
        ({"trainable_parameters": 0}, "trainable_parameters is 0"),
    ],
)
def test_a_budget_holds_exactly_one_value_in_range(given, message):
    with pytest.raises(ValueError, match=message):
        RankBudget(**given)


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("auto", "auto"),
        ("16", 16),
        ("24,100,100", (24, 100, 100)),
        ("bytes=8MB", RankBudget(bytes=8_000_000)),
        ("bytes=1.5KiB", RankBudget(bytes=1536)),
        ("error=0.5", RankBudget(error_ratio=0.5)),
        ("parameters=300000", RankBudget(trainable_parameters=300_000)),
    ],
)
def test_a_rank_is_read_from_text(text, rank):
    assert parse_rank(text) == rank


@pytest.mark.parametrize("text", ["", "many", "1.5", "2,x", "size=3", "parameters=few", "auto,2"])
def test_other_text_for_a_rank_is_refused_with_the_forms(text):
    with pytest.raises(ValueError, match=r"it must be auto, a whole number \(16\), three"):
        parse_rank(text)


def test_bytes_are_read_from_numbers_and_text():
    assert [parse_bytes("x", size) for size in (5, "5", "2GB", "2 GiB", "1e3KB")] == [
        5,
        5,
        2 * 10**9,
        2 << 30,
        10**6,
    ]
    with pytest.raises(ValueError, match="x is 'plenty'; give a positive number of bytes"):
        parse_bytes("x", "plenty")


def test_whole_numbers_of_numpy_are_taken_and_stored_as_plain_ones():
    assert type(Settings(rank=np.int64(4)).rank) is int
