"""Classes of texts, and what classes of texts and of images have in common."""

import copy
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
from qrefta.train.mean_loss import LossByRows
from qrefta.train.tasks.recipe import Recipe

SINGLE_LABEL = "single_label_classification"  # transformers' name for one class a row


def text_classes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Text classification; the metric is accuracy.

    A tokenizer without a pad token, such as Llama's, gets its end-of-text token as one.

    Raises:
        ValueError: if the classes of the data are not the labels of the model, or the tokenizer has
            no token to pad with.
    """
    check_labels(model, data)
    data = name_labels(model, data)
    _set_padding(model, tokenizer)
    tokens = tokenize(data, tokenizer, max_length)
    return Recipe(
        tokens["train"],
        tokens["test"],
        LossByRows,
        collate=DataCollatorWithPadding(tokenizer),
        metrics=accuracy,
        scores={"accuracy": "accuracy"},
        mean_loss=True,
    )


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Model inputs instead of the columns of text, cut to `max_length` tokens, without padding."""
    columns = [name for name in ("text", "text_pair") if name in data["train"].column_names]
    # the truncation of a call stays in the tokenizer, which is saved with the model
    tokenizer = copy.deepcopy(tokenizer)

    def encode(rows: dict[str, list[str]]) -> BatchEncoding:
        pairs = rows["text_pair"] if "text_pair" in columns else None
        encoded = tokenizer(rows["text"], pairs, truncation=True, max_length=max_length)
        encoded["cut"] = _cut(rows, encoded["input_ids"], tokenizer, max_length)
        return encoded

    encoded = data.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
    for name, part in encoded.items():
        warn_of_cut(sum(part["cut"]), len(part), str(name), max_length)
    return encoded.remove_columns("cut")


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model the same pad token, by which the model finds the end of a row."""
    config = model.config.get_text_config()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token and no end-of-text token, and the rows of a batch "
                'have different lengths; save the tokenizer with one: tokenizer.pad_token = "...".'
            )
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    if getattr(config, "pad_token_id", None) is None:  # a custom config may have none
        config.pad_token_id = tokenizer.pad_token_id


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
    """Raise ValueError unless every row has one of the label column's classes, and the model as
    many labels, of which one is right.
    """
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
    kind = model.config.problem_type
    if kind not in (None, SINGLE_LABEL):
        raise ValueError(
            f"The model's config has problem_type {kind!r}, and a row of the data has one class; "
            f'set model.config.problem_type = "{SINGLE_LABEL}".'
        )
    for split, part in data.items():
        rows: Any = part.with_format(None).select_columns(["label"])[:]
        numbers = rows["label"]
        wrong = [row for row, label in enumerate(numbers) if label not in range(classes)]
        if wrong:
            raise ValueError(
                f"The {split} split, row {wrong[0] + 1}, has the label {numbers[wrong[0]]!r}; it "
                f"must be a number of one of the {classes} classes, 0 to {classes - 1} "
                f"({len(wrong)} of {len(numbers)} rows). Label these rows or remove them."
            )


def label_names(config: PreTrainedConfig, classes: list[str]) -> list[str]:
    """Names for the labels of a model: the classes of the data, unless these are numbers or the
    model's names, in any order and letters.
    """
    names = names_of_labels(config)
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
    before = names_of_labels(config)
    names = label_names(config, classes)
    warn_of_new_names(before, names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    same = sorted(_small(names)) == sorted(_small(classes))
    if same and _small(names) != _small(classes):
        return data.align_labels_with_mapping(config.label2id, "label")
    return data


def warn_of_new_names(before: list[str], names: list[str]) -> None:
    """Warn that a model's labels get other names than before, if they had names."""
    if before and names != before:
        warnings.warn(
            f"The model's labels were named {before}; they get the names of the data's classes, "
            f"{names}. If they mean something else, its head was trained for another question.",
            stacklevel=4,
        )


def names_of_labels(config: PreTrainedConfig) -> list[str]:
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
