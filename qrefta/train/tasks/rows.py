"""The rows of a split as a task trains on them: all text, or all turns of conversations."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from qrefta.files.tables import with_names, without_added_nulls
from qrefta.train.tasks.turns import COLUMNS, are_plain, tools_of

TOOLS = Features({"tools": Json()})

# A row by column, words for its place, and whether the rows are text -> the columns read from it.
Reader = Callable[[dict[str, Any], str, bool], dict[str, Any]]


def text_features(columns: Sequence[str]) -> Features:
    """Columns of text."""
    return Features({name: Value("string") for name in columns})


def turn_features(columns: Sequence[str]) -> Features:
    """Columns of turns."""
    return Features({name: List(Json()) for name in columns})


def read_rows(
    part: Dataset,
    source: str,
    read: Reader,
    text: Sequence[str],
    turns: Sequence[str],
    keeps_others: bool = False,
) -> Dataset:
    """A split with the columns of a task.

    Args:
        part: with the columns of `qrefta.train.tasks.turns`.
        source: its name, for errors.
        read: called with every row.
        text: columns that `read` gives for rows of text, which the source has as text.
        turns: columns that it gives for other rows; tools are added, if the source has them.
        keeps_others: whether the source's other columns stay, tools among them.

    Raises:
        ValueError: from `read`.
    """
    part = with_names(part, COLUMNS)
    plain = are_plain(part, text)
    features = text_features(text) if plain else turn_features(turns)
    tools = not plain and not keeps_others and "tools" in part.column_names
    if tools:
        features = Features(features | TOOLS)
    if keeps_others:
        features = Features(part.features | features)
    return part.map(
        _read,
        with_indices=True,
        fn_kwargs={
            "read": read,
            "source": source,
            "plain": plain,
            "tools": tools,
            "given": part.features,
        },
        remove_columns=None if keeps_others else part.column_names,
        features=features,
        desc="Reading",
    )


def _read(
    row: dict[str, Any],
    index: int,
    read: Reader,
    source: str,
    plain: bool,
    tools: bool,
    given: Features,
) -> dict[str, Any]:
    row = without_added_nulls(row, given)
    where = f"{source}, row {index + 1}"
    found = read(row, where, plain)
    return found | {"tools": tools_of(row, where)} if tools else found
