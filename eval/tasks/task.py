"""Tasks of the training studies: model, rows and metric.

Named tasks are searched in a data folder (an argument, or the variable QREFTA_DATA), then on the
hub.
"""

import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from math import inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from eval.tasks.demo import docstring_sentences, model_folder
from qrefta.train.data import load_classification
from qrefta.train.models import load_classifier
from qrefta.train.tasks.classify import tokenize

DatasetOption = Annotated[
    str | None, typer.Option(help="Hub name, folder or file; default: docstring sentences.")
]
HeaderOption = Annotated[
    list[str] | None, typer.Option(help="Column names, in order, of a file without header.")
]
DATA = "QREFTA_DATA"
FURTHER_TEST = "test-labeled.tsv"


class Named(NamedTuple):
    """A named task.

    Attributes:
        hub: name on the hub; "" if the hub has no readable form.
        header: column names of a file without header.
        metric: a name in METRICS.
        balanced: whether to draw equally many training rows per class.
        kind: text, image, language (running text), choice or prompt (a classification as choice).
        folder: path below the data folder; "" for the name itself.
        files: content of the folder, for error messages.
        answers: of a prompt, one a class.
    """

    hub: str = ""
    header: list[str] | None = None
    metric: str = "accuracy"
    balanced: bool = False
    kind: str = "text"
    folder: str = ""
    files: str = "train.tsv and dev.tsv, GLUE's files"
    answers: tuple[str, ...] = ()


_JSON = "train.json and test.json, LLM-Adapters' lists of {instruction, answer}"
NAMED = {
    "sst2": Named("nyu-mll/glue:sst2"),
    "sst2-prompt": Named(
        "nyu-mll/glue:sst2", kind="prompt", folder="sst2", answers=("negative", "positive")
    ),
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
    "commonsense": Named(kind="choice", files=f"folders with {_JSON}"),
    "arc-easy": Named(kind="choice", folder="commonsense/ARC-Easy", files=_JSON),
    "arc-challenge": Named(kind="choice", folder="commonsense/ARC-Challenge", files=_JSON),
    "boolq": Named(kind="choice", folder="commonsense/boolq", files=_JSON),
    "openbookqa": Named(kind="choice", folder="commonsense/openbookqa", files=_JSON),
    "piqa": Named(kind="choice", folder="commonsense/piqa", files=_JSON),
    "social_i_qa": Named(kind="choice", folder="commonsense/social_i_qa", files=_JSON),
    "winogrande": Named(kind="choice", folder="commonsense/winogrande", files=_JSON),
}


class Sizes(NamedTuple):
    """Most rows for training, validation and test, and most tokens per row."""

    train: int = 2000
    validation: int = 500
    test: int = 2000
    length: int = 64


class Task(NamedTuple):
    """The data, model and metric of one seed of a study.

    Attributes:
        train, validation, test: model inputs.
        collate: rows -> a batch.
        model: seed -> a fresh model.
        heads: modules of the base model that are fully trained, in addition to the task's head.
        metric: a name in METRICS.
        judge: metric and loss of a model on rows, if predictions do not give them.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    collate: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]
    model: Callable[[int], PreTrainedModel]
    heads: list[str]
    metric: str
    judge: Callable[[nn.Module, Dataset], tuple[float, float]] | None = None


def load_task(
    dataset: str | None, header: list[str] | None, seed: int, train_rows: int, test_rows: int
) -> DatasetDict:
    """Training and test rows drawn with `seed`; docstring sentences if `dataset` is None.

    Data without a test split are split equally for every seed, so test rows never train. If a
    folder has a test-labeled.tsv beside its dev.tsv, as SST-2 can have, both are test rows.
    """
    if dataset is None:
        return docstring_sentences(train_size=train_rows, test_size=test_rows)
    data = load_classification(dataset, header=header)
    further = Path(dataset) / FURTHER_TEST
    if further.is_file():
        parts = load_classification(further, header=header).values()
        data["test"] = concatenate_datasets([data["test"], *parts])
    limits = {"train": train_rows, "test": test_rows}
    return DatasetDict(
        {
            name: part.shuffle(seed).select(range(min(limits[name], len(part))))
            for name, part in data.items()
        }
    )


def find_data(name: str, folder: Path | None) -> str:
    """The source of a task's data: in the data folder, else the name (hub name, folder, file).

    Raises:
        ValueError: if the data of a named task are missing and cannot come from the hub.
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
            f"The data for {name} are missing: {folder or f'${DATA}'} has no folder {place}"
            f"{' and the hub is switched off' if known.hub else ''}. Give --data a folder whose "
            f"{place} contains "
            f"{known.files}{f', or unset HF_HUB_OFFLINE for {known.hub}' if known.hub else ''}."
        )
    return known.hub


def text_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """Text classification; validation rows come from the training split."""
    known = NAMED.get(name, Named())
    wanted = sizes.train + sizes.validation
    data = load_task(
        source, header or known.header, seed, sys.maxsize if known.balanced else wanted, sizes.test
    )
    if known.balanced:
        data["train"] = balanced(data["train"], wanted)
    if len(data["train"]) <= sizes.validation:
        raise ValueError(
            f"{source} has {len(data['train'])} training rows and {sizes.validation} are put "
            f"aside to choose a "
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
    """At most `count` rows with equally many (to 1) of each class, in their order."""
    turns: Counter[int] = Counter()
    ranked = []
    for place, label in enumerate(rows["label"]):
        ranked.append((turns[label], place))
        turns[label] += 1
    common = min(turns.values())
    return rows.select(sorted(place for turn, place in sorted(ranked)[:count] if turn < common))


def by_length(rows: Dataset) -> Dataset:
    """The rows, shortest first, so that test batches have little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def in_order(rows: Dataset, steps: int, batch_size: int, seed: int) -> Dataset:
    """The rows of `steps` batches in the order that every method sees.

    Each epoch is shuffled. Within runs of 25 batches, rows of similar length share a batch, and the
    batches are shuffled. The longest rows of a run that do not fill a batch are left out.
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
    """Share of correct predictions."""
    return float((_classes(prediction) == prediction.label_ids).mean())


def matthews(prediction: PredictionOutput) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 if one side is constant."""
    found = _classes(prediction)
    labels = np.asarray(prediction.label_ids)
    classes = range(int(max(found.max(), labels.max())) + 1)
    told, true = (
        np.stack([values == index for index in classes]).astype(float) for values in (found, labels)
    )
    told, true = (one - one.mean(axis=1, keepdims=True) for one in (told, true))
    spread = np.sqrt((told**2).sum() * (true**2).sum())
    return float((told * true).sum() / spread) if spread else 0.0


def perplexity(prediction: PredictionOutput) -> float:
    """Exponential of the mean loss per token."""
    return float(np.exp(prediction.metrics["test_loss"]))


class Metric(NamedTuple):
    """A score.

    Attributes:
        score: its value for the predictions of a model.
        margin: the loss of score that counts as none; absolute, or a share if `relative`.
        more_is_better: whether a larger value is better.
        of_loss: whether it is computed from the loss.
        relative: whether the margin is a share of the score.
    """

    score: Callable[[PredictionOutput], float]
    margin: float
    more_is_better: bool = True
    of_loss: bool = False
    relative: bool = False


METRICS = {
    "accuracy": Metric(accuracy, 0.005),
    "matthews": Metric(matthews, 0.01),
    "perplexity": Metric(perplexity, 0.005, more_is_better=False, of_loss=True, relative=True),
}


# Learning rates that every method is searched on.
RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3))


def best_rate(rows: list[dict[str, Any]]) -> float:
    """The learning rate of the rows with the best mean metric, then the least mean loss.

    A rate at which one run diverged is last.
    """
    by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_rate[row["learning_rate"]].append(row)
    return max(by_rate, key=lambda rate: _merit(by_rate[rate]))


def _merit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    loss = fmean(row["loss"] for row in rows)
    if not isfinite(loss):
        return -inf, -inf
    value = fmean(row["value"] for row in rows)
    return value if METRICS[rows[0]["metric"]].more_is_better else -value, -loss


def _classes(prediction: PredictionOutput) -> np.ndarray:
    logits = (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )
    return np.argmax(logits, axis=-1)
