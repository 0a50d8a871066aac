"""The classification task that a training study runs: its options, and the rows of a seed."""

from typing import Annotated

import typer
from datasets import DatasetDict

from eval.demo import docstring_sentences
from qrefta.data import load_classification

DatasetOption = Annotated[str | None, typer.Option(help="Hub name, folder or file; default: docstring sentences.")]
HeaderOption = Annotated[list[str] | None, typer.Option(help="Column names, in order, of a file without header.")]


def load_task(dataset: str | None, header: list[str] | None, seed: int, train_rows: int, test_rows: int) -> DatasetDict:
    """At most so many rows to train and to test on, drawn with `seed`; docstring sentences where no data are named."""
    if dataset is None:
        return docstring_sentences(train_size=train_rows, test_size=test_rows)
    data = load_classification(dataset, header=header, seed=seed)
    limits = {"train": train_rows, "test": test_rows}
    return DatasetDict(
        {name: part.shuffle(seed).select(range(min(limits[name], len(part)))) for name, part in data.items()}
    )
