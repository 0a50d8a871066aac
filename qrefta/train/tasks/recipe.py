"""Data of a task and the Trainer for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction, Trainer


def combined(*kinds: type[Trainer]) -> type[Trainer]:
    """A subclass of several classes of Trainer, with the name of the last; a method of the first
    comes before the others'.
    """
    return type(kinds[-1].__name__, kinds, {})


@dataclass(frozen=True)
class Recipe:
    """Data of a task and the Trainer for it.

    Attributes:
        train, test: as the Trainer takes them.
        trainer: its class.
        collate: rows to a batch; None: by the Trainer.
        metrics: of the test rows; None: the loss alone.
        options: further arguments of the Trainer.
        scores: fields of a result (accuracy, reward) -> the metrics of the Trainer that they are.
        mean_loss: the loss of a batch is a mean over its rows, not over tokens.
    """

    train: Dataset
    test: Dataset
    trainer: type[Trainer] = Trainer
    collate: Callable[[list[dict[str, Any]]], Any] | None = None
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    mean_loss: bool = False
