"""Several data sets in one run, drawn in proportion to their weights."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datasets import DatasetDict, concatenate_datasets, interleave_datasets

from qrefta.choices import Task
from qrefta.config.checks import positive
from qrefta.files.tables import BUILDERS, kind_of
from qrefta.train.tasks.recipe import Recipe

MIXED: tuple[Task, ...] = ("lm", "sft", "dpo", "grpo")


class Mixture(NamedTuple):
    """Data sets of one task and the weight of each."""

    parts: list[DatasetDict]
    weights: list[float]


def is_mix(data: object) -> bool:
    """Whether an object has the form of several data sets: names with weights."""
    if not isinstance(data, Mapping):
        return False
    return all(isinstance(weight, float | int | str | None) for weight in data.values())


def load_mixture(
    task: Task, load: Callable[..., DatasetDict], sources: Mapping[str | Path, float], seed: int
) -> Mixture:
    """The data of each source with its weight.

    Raises:
        ValueError: if a weight is not positive, or the task takes one data set only.
    """
    if task not in MIXED:
        raise ValueError(
            f"several data sets are for the tasks {', '.join(MIXED)}; the task is {task!r}"
        )
    for source, weight in sources.items():
        positive(f"the weight of {source}", weight)
    return Mixture([load(source, seed=seed) for source in sources], list(sources.values()))


def mixed_recipe(make: Callable[[DatasetDict], Recipe], mixture: Mixture, seed: int) -> Recipe:
    """One recipe for all data sets: training rows by weight, all test rows.

    The next training row is of a data set with the probability of its weight, and any of its rows
    that was not drawn yet, until the rows of one data set are used up. The draw is made once: every
    epoch has these rows, each once.

    Args:
        make: the data of one set to its recipe.
        mixture: the data sets.
        seed: of the draw.

    Raises:
        ValueError: if the data sets have different columns.
    """
    recipes = [make(part) for part in mixture.parts]
    first = recipes[0].train.features
    for recipe in recipes[1:]:
        if recipe.train.features != first:
            raise ValueError(
                "The data sets have different columns and cannot be mixed: "
                f"{dict(first)} and {dict(recipe.train.features)}."
            )
    total = sum(mixture.weights)
    train = interleave_datasets(
        [recipe.train.shuffle(seed=seed) for recipe in recipes],  # files may be sorted
        probabilities=[weight / total for weight in mixture.weights],
        seed=seed,
        stopping_strategy="first_exhausted",
    )
    test = concatenate_datasets([recipe.test for recipe in recipes])
    return replace(recipes[0], train=train, test=test)


def parse_weight(text: str) -> tuple[str, float]:
    """Source and weight of "source:weight"; the weight is 1 if there is none.

    A hub name may have a configuration, also before the weight: "name:config:0.5".

    Raises:
        ValueError: if a weight stands behind a file, a folder or a configuration and is no number.
    """
    source, _, weight = text.rpartition(":")
    if not source:
        return text, 1.0
    with suppress(ValueError):
        return source, float(weight)
    if ":" in source or kind_of(Path(source)) in BUILDERS or Path(source).exists():
        raise ValueError(
            f"--mix {text} has the weight {weight!r}; it must be a number, such as 0.5"
        )
    return text, 1.0
