"""The options of `qrefta finetune` that name its data: sources with weights, and columns."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrefta.choices import Task

if TYPE_CHECKING:
    from datasets import DatasetDict

    from qrefta.train.tasks.mixture import Mixture


def further_sources(dataset: str, mix: list[str]) -> dict[str | Path, float]:
    """The further data sets of --mix and their weights."""
    from qrefta.train.tasks.mixture import parse_weight

    further: dict[str | Path, float] = {}
    for source, weight in map(parse_weight, mix):
        if source in (dataset, *further):
            raise ValueError(
                f"{source} is given twice; give it once, with a larger weight in --mix."
            )
        further[source] = weight
    return further


def columns_of(
    task: Task, text_column: list[str] | None, label_column: str | None, header: list[str] | None
) -> dict[str, Any]:
    """The options of columns, by their names in the task's loader."""
    if task == "classify":
        return {"text_columns": text_column, "label_column": label_column, "header": header}
    given = {"--label-column": label_column, "--header": header}
    if task != "lm":
        given["--text-column"] = text_column
    name = next((name for name, value in given.items() if value), None)
    if name is not None:
        also = " and lm" if name == "--text-column" else ""
        raise ValueError(f"{name} is for the task classify{also}; the task is {task}")
    if not text_column:
        return {}
    if len(text_column) > 1:
        raise ValueError(f"--text-column is {text_column}; the task lm reads one column")
    return {"column": text_column[0]}


def load_data(
    task: Task, dataset: str, mix: dict[str | Path, float], seed: int, columns: dict[str, Any]
) -> "DatasetDict | Mixture":
    """The data of the run: of one source, or of several with weights."""
    from qrefta.train.tasks import TASKS
    from qrefta.train.tasks.mixture import Mixture, load_mixture

    load = partial(TASKS[task].load, **columns)
    data = load(dataset, seed=seed)
    if not mix:
        return data
    others = load_mixture(task, load, mix, seed)
    return Mixture([data, *others.parts], [1.0, *others.weights])
