"""What a fine-tuning run needs beside the model, by task: rows to train and test on, batches of them, a Trainer.

`classify` takes text with labels, `lm` running text, `sft` conversations or prompts with completions (for TRL's
SFTTrainer), `image` pictures with labels.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from qrefta.train.data import load_classification, pick_splits, read_splits, text_column, with_test

_TEST_SHARE = 0.1  # of the rows, where there is no test split
_IMAGE_COLUMNS = {"img": "image", "labels": "label", "fine_label": "label"}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


class Recipe(NamedTuple):
    """A task's data and its Trainer.

    Attributes:
        train, test: as the Trainer takes them.
        trainer, arguments: classes.
        options: further arguments of `arguments`.
        collate: rows to a batch; None: the Trainer's own.
        metrics: of the test rows; None: the loss alone.
        mean_loss: a batch's loss is a mean over its rows, not over tokens.
    """

    train: Dataset
    test: Dataset
    trainer: type[Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments
    options: dict[str, Any] = {}  # noqa: RUF012
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    mean_loss: bool = False


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int,
    **_: Any,
) -> Recipe:
    """Text classification; the metric is accuracy.

    Raises:
        ValueError: if the model's labels are not the data's.
    """
    check_labels(model, data)
    tokens = tokenize(data, tokenizer, max_length)
    return Recipe(
        tokens["train"],
        tokens["test"],
        collate=DataCollatorWithPadding(tokenizer),
        metrics=accuracy,
        mean_loss=True,
    )


def language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int,
    **_: Any,
) -> Recipe:
    """Next tokens of running text, in blocks of `max_length` tokens; texts follow each other with an end-of-text token.

    Raises:
        ValueError: if a split has less than a block of text.
    """
    blocks = {}
    for name, part in data.items():
        ids = part.map(
            partial(_blocks, tokenizer=tokenizer, length=max_length),
            batched=True,
            batch_size=len(part),
            remove_columns=part.column_names,
            desc="Tokenizing",
        )
        if len(ids) == 0:
            raise ValueError(
                f"The {name} split has less than {max_length} tokens; give more text or less max_length."
            )
        blocks[name] = ids
    return Recipe(blocks["train"], blocks["test"])


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int,
    packing: bool = False,
    **_: Any,
) -> Recipe:
    """Supervised fine-tuning on completions: the loss is over the last answer of a conversation alone.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
        ImportError: if TRL is not installed.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ImportError("The task sft needs TRL: pip install trl") from error
    if not isinstance(data["train"][0]["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            "The data hold conversations and the tokenizer has no chat template; set tokenizer.chat_template, or give "
            "columns prompt and completion of plain text."
        )
    options = {"max_length": max_length, "packing": packing, "completion_only_loss": True}
    return Recipe(data["train"], data["test"], SFTTrainer, SFTConfig, options)


def images(
    model: PreTrainedModel, processor: BaseImageProcessor, data: DatasetDict, **_: Any
) -> Recipe:
    """Image classification; the metric is accuracy. Pictures are read as they are needed.

    Raises:
        ValueError: if the model's labels are not the data's.
    """
    check_labels(model, data)

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [picture.convert("RGB") for picture in rows["image"]]
        return {
            "pixel_values": processor(pictures, return_tensors="pt")["pixel_values"],
            "label": rows["label"],
        }

    train, test = (data[name].with_transform(pixels) for name in ("train", "test"))
    options = {
        "remove_unused_columns": False
    }  # the column of pictures is none that the model takes
    return Recipe(train, test, options=options, collate=_stack, metrics=accuracy, mean_loss=True)


def load_text(source: str | Path, seed: int) -> DatasetDict:
    """Running text with the splits train and test, column text: .txt files, or tables with a column of text."""
    parts = read_splits(source)
    return with_test(parts.select_columns([text_column(parts["train"], source)]), _TEST_SHARE, seed)


def load_chat(source: str | Path, seed: int) -> DatasetDict:
    """Prompts and completions with the splits train and test.

    Columns are prompt and completion (text or messages), messages or conversations (role and content, or from and
    value; the last turn is the assistant's), or instruction, input if there is one, and output.

    Raises:
        ValueError: for other columns, or a conversation that does not end with an answer.
    """
    parts = read_splits(source)
    pairs = {
        name: part.map(_pair, remove_columns=part.column_names, desc="Reading")
        for name, part in parts.items()
    }
    return with_test(DatasetDict(pairs), _TEST_SHARE, seed)


def load_images(source: str | Path, seed: int) -> DatasetDict:
    """Pictures with the splits train and test, columns image and label: a folder of folders, or a hub name.

    Raises:
        ValueError: if there are no such columns.
    """
    name, _, config = str(source).partition(":")
    local = Path(source).is_dir()
    splits = (
        load_dataset("imagefolder", data_dir=str(source))
        if local
        else load_dataset(name, config or None)
    )
    parts = pick_splits(splits, source).rename_columns(
        {old: new for old, new in _IMAGE_COLUMNS.items() if old in splits["train"].column_names}
    )
    features = parts["train"].features
    if "image" not in features or not isinstance(features.get("label"), ClassLabel):
        raise ValueError(
            f"{source} has the columns {list(features)}; needed are image, and label with classes."
        )
    return with_test(parts.select_columns(["image", "label"]), _TEST_SHARE, seed)


class Task(NamedTuple):
    """How a task is prepared.

    Attributes:
        load: source and seed to a `DatasetDict`.
        recipe: model, tokenizer (or image processor), data, max_length, packing to a `Recipe`.
        model, processor: the auto classes.
    """

    load: Callable[..., DatasetDict]
    recipe: Callable[..., Recipe]
    model: type
    processor: type


TASKS = {
    "classify": Task(
        load_classification, classify, AutoModelForSequenceClassification, AutoTokenizer
    ),
    "lm": Task(load_text, language_model, AutoModelForCausalLM, AutoTokenizer),
    "sft": Task(load_chat, chat, AutoModelForCausalLM, AutoTokenizer),
    "image": Task(load_images, images, AutoModelForImageClassification, AutoImageProcessor),
}


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Model inputs in place of the columns text and text_pair, not padded, cut to `max_length` tokens."""
    texts = [name for name in ("text", "text_pair") if name in data["train"].column_names]
    return data.map(
        lambda rows: tokenizer(
            *(rows[name] for name in texts), truncation=True, max_length=max_length
        ),
        batched=True,
        remove_columns=texts,
        desc="Tokenizing",
    )


def check_labels(model: PreTrainedModel, data: DatasetDict) -> None:
    """Raise unless the labels are classes, as many as the model has."""
    feature = data["train"].features["label"]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            "The label column is no ClassLabel; read the data with qrefta.train.data.load_classification."
        )
    if model.config.num_labels != feature.num_classes:
        raise ValueError(
            f"The model has {model.config.num_labels} labels and the data {feature.num_classes} classes; load it with "
            f"num_labels={feature.num_classes}."
        )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = (
        prediction.predictions[0]
        if isinstance(prediction.predictions, tuple)
        else prediction.predictions
    )
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _blocks(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, list[list[int]]]:
    (texts,) = rows.values()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        token for text in tokenizer(texts, verbose=False)["input_ids"] for token in [*text, *end]
    ]
    blocks = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return {"input_ids": blocks, "labels": blocks}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row as prompt and completion."""
    if "prompt" in row and "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if "instruction" in row and "output" in row:
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": row["output"]},
        ]
    else:
        turns = [_turn(turn) for turn in row.get("messages") or row.get("conversations") or []]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"A row has the columns {list(row)} and {len(turns)} turns; needed are prompt and completion, instruction "
            "and output, or messages of which the last is the assistant's."
        )
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _turn(turn: dict[str, str]) -> dict[str, str]:
    role, content = (
        turn.get(key) or turn.get(other) for key, other in (("role", "from"), ("content", "value"))
    )
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"A turn is {turn!r}; needed are a role ({', '.join(_ROLES)}) and its content."
        )
    return {"role": _ROLES[role], "content": content}


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
