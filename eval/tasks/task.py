"""What a training study trains on: a task's model, its rows, and how it is scored.

Named tasks are looked for in a folder of data (an argument, or the variable QREFTA_DATA), then on the hub.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from eval.tasks.demo import docstring_sentences, model_folder
from qrefta.train.data import load_classification
from qrefta.train.models import load_classifier
from qrefta.train.tasks import tokenize

DatasetOption = Annotated[
    str | None, typer.Option(help="Hub name, folder or file; default: docstring sentences.")
]
HeaderOption = Annotated[
    list[str] | None, typer.Option(help="Column names, in order, of a file without header.")
]
DATA = "QREFTA_DATA"


class Named(NamedTuple):
    """A task that is known by name.

    Attributes:
        hub: where the hub has it; "" where it has no form that is read here.
        header: column names of a file without header.
        metric: a name in METRICS.
        balanced: draw as many training rows of each class: few rows of unequal classes teach little but the larger one.
        kind: text, image, language (running text) or choice.
        folder: below the folder of data; "" for the name itself.
        files: what a folder holds, for who has to get it.
    """

    hub: str = ""
    header: list[str] | None = None
    metric: str = "accuracy"
    balanced: bool = False
    kind: str = "text"
    folder: str = ""
    files: str = "train.tsv and dev.tsv, GLUE's files"


_JSON = "train.json and test.json, LLM-Adapters' lists of {instruction, output, answer}"
NAMED = {
    "sst2": Named("nyu-mll/glue:sst2"),
    "cola": Named(
        "nyu-mll/glue:cola",
        ["source", "label", "mark", "sentence"],
        metric="matthews",
        balanced=True,
    ),
    "cifar10": Named("uoft-cs/cifar10", kind="image", files="train.parquet and test.parquet"),
    "tinyshakespeare": Named(metric="perplexity", kind="language", files="a .txt file"),
    "wikitext2": Named(
        metric="perplexity", kind="language", files="train.txt and test.txt, or one .txt file"
    ),
    "arc-easy": Named(kind="choice", folder="commonsense/ARC-Easy", files=_JSON),
    "arc-challenge": Named(kind="choice", folder="commonsense/ARC-Challenge", files=_JSON),
    "boolq": Named(kind="choice", folder="commonsense/boolq", files=_JSON),
    "openbookqa": Named(kind="choice", folder="commonsense/openbookqa", files=_JSON),
    "piqa": Named(kind="choice", folder="commonsense/piqa", files=_JSON),
    "social_i_qa": Named(kind="choice", folder="commonsense/social_i_qa", files=_JSON),
    "winogrande": Named(kind="choice", folder="commonsense/winogrande", files=_JSON),
}


class Sizes(NamedTuple):
    """Rows to train on, to choose a learning rate with, and to test on, at most; tokens a row is cut to."""

    train: int = 2000
    validation: int = 500
    test: int = 2000
    length: int = 64


class Task(NamedTuple):
    """What one seed of a study trains and tests on.

    Attributes:
        train, validation, test: model inputs.
        collate: rows -> a batch.
        model: seed -> a fresh model.
        heads: modules of the base model that train whole beside the task's own head.
        metric: a name in METRICS.
        judge: the metric of a model on validation or test rows, where predictions do not tell it.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    collate: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]
    model: Callable[[int], PreTrainedModel]
    heads: list[str]
    metric: str
    judge: Callable[[nn.Module, Dataset], float] | None = None


def load_task(
    dataset: str | None, header: list[str] | None, seed: int, train_rows: int, test_rows: int
) -> DatasetDict:
    """At most so many rows to train and to test on, drawn with `seed`; docstring sentences where no data are named.

    Data without a test split are split alike for every seed: what tests never trains.
    """
    if dataset is None:
        return docstring_sentences(train_size=train_rows, test_size=test_rows)
    data = load_classification(dataset, header=header)
    limits = {"train": train_rows, "test": test_rows}
    return DatasetDict(
        {
            name: part.shuffle(seed).select(range(min(limits[name], len(part))))
            for name, part in data.items()
        }
    )


def find_data(name: str, folder: Path | None) -> str:
    """Where a task's data are: below a folder of data, else what the name says itself (hub name, folder, file).

    Raises:
        ValueError: if a named task's data are not there, and not on a hub that may be asked.
    """
    if name not in NAMED:
        return name
    known = NAMED[name]
    folder = folder or (Path(os.environ[DATA]) if DATA in os.environ else None)
    place = known.folder or name
    if folder is not None and (folder / place).is_dir():
        return str(folder / place)
    if not known.hub or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ValueError(
            f"There are no data for {name}: {folder or f'${DATA}'} has no folder {place}"
            f"{' and the hub is switched off' if known.hub else ''}. Give --data a folder whose {place} holds "
            f"{known.files}{f', or unset HF_HUB_OFFLINE for {known.hub}' if known.hub else ''}."
        )
    return known.hub


def text_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """Text classification: rows drawn with `seed`, validation rows put aside from the training split."""
    known = NAMED.get(name, Named())
    wanted = sizes.train + sizes.validation
    data = load_task(
        source, header or known.header, seed, sys.maxsize if known.balanced else wanted, sizes.test
    )
    if known.balanced:
        data["train"] = balanced(data["train"], wanted)
    if len(data["train"]) <= sizes.validation:
        raise ValueError(
            f"{source} has {len(data['train'])} training rows and {sizes.validation} are put aside to choose a "
            "learning rate; give more rows or a smaller --validation-rows."
        )
    feature: ClassLabel = data["train"].features["label"]
    path = model or str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenize(data, tokenizer, sizes.length)
    base = load_classifier(path, feature.names, seed=0).base_model
    return Task(
        train=tokens["train"].select(range(sizes.validation, len(tokens["train"]))),
        validation=by_length(tokens["train"].select(range(sizes.validation))),
        test=by_length(tokens["test"]),
        collate=DataCollatorWithPadding(tokenizer),
        model=lambda seed: load_classifier(path, feature.names, seed),
        heads=[child for child, _ in base.named_children() if child == "pooler"],
        metric=known.metric,
    )


def balanced(rows: Dataset, count: int) -> Dataset:
    """The first `count` rows at most that hold each class equally often (to one), in their order."""
    turns: Counter[int] = Counter()
    ranked = []
    for place, label in enumerate(rows["label"]):
        ranked.append((turns[label], place))
        turns[label] += 1
    common = min(turns.values())
    return rows.select(sorted(place for turn, place in sorted(ranked)[:count] if turn < common))


def by_length(rows: Dataset) -> Dataset:
    """The rows with the shortest first, so that batches to score have little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def in_order(rows: Dataset, steps: int, batch_size: int, seed: int) -> Dataset:
    """The rows of `steps` batches, one behind the other, as every method will see them.

    Each epoch is shuffled; in runs of 25 batches rows of like length share a batch, and the batches are shuffled. What
    fills no whole batch of its run, the longest rows, is left out.
    """
    generator = random.Random(seed)
    lengths = (
        [len(ids) for ids in rows["input_ids"]]
        if "input_ids" in rows.column_names
        else [0] * len(rows)
    )
    order: list[int] = []
    while len(order) < steps * batch_size:
        epoch = generator.sample(range(len(rows)), len(rows))
        batches = []
        for start in range(0, len(epoch), 25 * batch_size):
            run = sorted(epoch[start : start + 25 * batch_size], key=lengths.__getitem__)
            batches += [run[at : at + batch_size] for at in range(0, len(run), batch_size)]
        whole = [batch for batch in batches if len(batch) == min(batch_size, len(rows))]
        order += [row for batch in generator.sample(whole, len(whole)) for row in batch]
    return rows.select(order[: steps * batch_size])


def accuracy(prediction: PredictionOutput) -> float:
    """Share of right answers."""
    return float((_classes(prediction) == prediction.label_ids).mean())


def matthews(prediction: PredictionOutput) -> float:
    """Matthews correlation of answers and labels, any number of classes (Gorodkin 2004); 0 where one is constant."""
    found, labels = _classes(prediction), np.asarray(prediction.label_ids)
    classes = range(int(max(found.max(), labels.max())) + 1)
    told, true = (
        np.stack([values == index for index in classes]).astype(float) for values in (found, labels)
    )
    told, true = (one - one.mean(axis=1, keepdims=True) for one in (told, true))
    spread = np.sqrt((told**2).sum() * (true**2).sum())
    return float((told * true).sum() / spread) if spread else 0.0


def perplexity(prediction: PredictionOutput) -> float:
    """Exponential of the mean loss of a token."""
    return float(np.exp(prediction.metrics["test_loss"]))


class Metric(NamedTuple):
    """A score, and whether more of it is better; one that is made of the loss needs no logits."""

    score: Callable[[PredictionOutput], float]
    more_is_better: bool = True
    of_loss: bool = False


METRICS = {
    "accuracy": Metric(accuracy),
    "matthews": Metric(matthews),
    "perplexity": Metric(perplexity, more_is_better=False, of_loss=True),
}


def merit(row: dict[str, Any]) -> tuple[float, float]:
    """What the better of two learning rates has more of: the metric, then less loss; one that diverged has none."""
    if not isfinite(row["loss"]):
        return -inf, -inf
    return row["value"] if METRICS[row["metric"]].more_is_better else -row["value"], -row["loss"]


def _classes(prediction: PredictionOutput) -> np.ndarray:
    logits = (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )
    return np.argmax(logits, axis=-1)
