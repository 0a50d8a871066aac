"""Classes of texts, and what classes of texts and of images have in common."""

import warnings
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qrefta.train.lengths import warn_of_cut
from qrefta.train.tasks.recipe import Recipe


def text_classes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Text classification; the metric is accuracy.

    Raises:
        ValueError: if the classes of the data are not the labels of the model.
    """
    check_labels(model, data)
    data = name_labels(model, data)
    tokens = tokenize(data, tokenizer, max_length)
    return Recipe(
        tokens["train"],
        tokens["test"],
        collate=DataCollatorWithPadding(tokenizer),
        metrics=accuracy,
        scores={"accuracy": "accuracy"},
        mean_loss=True,
    )


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Model inputs instead of the columns of text, cut to `max_length` tokens, without padding."""
    columns = [name for name in ("text", "text_pair") if name in data["train"].column_names]

    def encode(rows: dict[str, list[str]]) -> BatchEncoding:
        pairs = rows["text_pair"] if "text_pair" in columns else None
        encoded = tokenizer(rows["text"], pairs, truncation=True, max_length=max_length)
        encoded["cut"] = _cut(rows, encoded["input_ids"], tokenizer, max_length)
        return encoded

    encoded = data.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
    for name, part in encoded.items():
        warn_of_cut(sum(part["cut"]), len(part), str(name), max_length)
    return encoded.remove_columns("cut")


def _cut(
    rows: dict[str, list[str]], ids: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[bool]:
    """Whether each row has more tokens than `max_length`, to which `ids` are cut."""
    full = [row for row, tokens in enumerate(ids) if len(tokens) >= max_length]
    if not full:
        return [False] * len(ids)
    texts = [rows["text"][row] for row in full]
    pairs = [rows["text_pair"][row] for row in full] if "text_pair" in rows else None
    one_more = tokenizer(texts, pairs, truncation=True, max_length=max_length + 1)
    longer: Any = one_more["input_ids"]
    cut = {row for row, tokens in zip(full, longer) if len(tokens) > len(ids[row])}
    return [row in cut for row in range(len(ids))]


def check_labels(model: PreTrainedModel, data: DatasetDict) -> None:
    """Raise ValueError unless the label column has classes, and the model as many labels."""
    feature = data["train"].features["label"]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The label column is a {type(feature).__name__}, not a ClassLabel; read the data with "
            "qrefta.train.data.load_classification."
        )
    labels = model.config.num_labels
    classes = len(feature.names)
    if labels != classes:
        raise ValueError(
            f"The model has {labels} labels and the data {classes} classes; load the model with "
            f"num_labels={classes}."
        )


def label_names(config: PreTrainedConfig, classes: list[str]) -> list[str]:
    """Names for the labels of a model: the classes of the data, unless these are numbers or the
    model's names, in any order and letters.
    """
    names = _names(config)
    are_numbers = all(name.lstrip("-").isdecimal() for name in classes)
    if names and (are_numbers or sorted(_small(names)) == sorted(_small(classes))):
        return names
    return classes


def name_labels(model: PreTrainedModel, data: DatasetDict) -> DatasetDict:
    """Name the model's labels by `label_names`; the data with labels in the model's order.

    A warning tells if the model's names are replaced.
    """
    config = model.config
    classes = data["train"].features["label"].names
    before = _names(config)
    names = label_names(config, classes)
    if before and names != before:
        warnings.warn(
            f"The model's labels were named {before}; they get the names of the data's classes, "
            f"{classes}.",
            stacklevel=3,
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    same = sorted(_small(names)) == sorted(_small(classes))
    if same and _small(names) != _small(classes):
        return data.align_labels_with_mapping(config.label2id, "label")
    return data


def _names(config: PreTrainedConfig) -> list[str]:
    """The names of the labels, in order; none, if they have transformers' names LABEL_0, ...."""
    named: dict[Any, str] = config.id2label or {}
    if all(name == f"LABEL_{label}" for label, name in named.items()):
        return []
    return [str(named[label]) for label in sorted(named)]


def _small(names: list[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the test rows whose largest logit is their label."""
    logits = prediction.predictions
    if isinstance(logits, tuple):  # further outputs of the model follow
        logits = logits[0]
    correct = np.argmax(logits, axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(correct))}
