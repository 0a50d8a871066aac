"""Tasks of a fine-tuning run: rows to train and test on, batches of them, and the Trainer class.

`classify` takes text with labels, `lm` running text, `sft` conversations or prompts with
completions (for TRL's SFTTrainer), `image` images with labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from qrefta.files.tables import text_column
from qrefta.split.texts import token_stream
from qrefta.train.data import load_classification, pick_splits, read_splits, with_test

TaskName = Literal["classify", "lm", "sft", "image"]

_TEST_SHARE = 0.1  # of the rows of a source without a test split
_IMAGE_COLUMNS = {"img": "image", "labels": "label", "fine_label": "label"}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Recipe:
    """Data of a task and the Trainer for it.

    Attributes:
        train, test: as the Trainer takes them.
        trainer: its class.
        collate: rows to a batch; None: by the Trainer.
        metrics: of the test rows; None: the loss alone.
        mean_loss: the loss of a batch is a mean over its rows, not over tokens.
    """

    train: Dataset
    test: Dataset
    trainer: type[Trainer] = Trainer
    collate: Callable[[list[dict[str, Any]]], Any] | None = None
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    mean_loss: bool = False


def classify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Text classification; the metric is accuracy.

    Raises:
        ValueError: if the classes of the data are not the labels of the model.
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Next-token prediction on running text, in blocks of `max_length` tokens.

    Every text ends with an end-of-text token.

    Raises:
        ValueError: if a split has less text than one block.
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
                f"The {name} split has less than {max_length} tokens; give more text or a lower "
                "max_length."
            )
        blocks[name] = ids
    return Recipe(blocks["train"], blocks["test"])


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Supervised fine-tuning by TRL, with the loss on the last answer.

    TRL reads `max_length` from its SFTConfig.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
        ImportError: if TRL is not installed.
    """
    trainer, _ = load_trl()
    _check_template(data["train"][0], tokenizer)
    return Recipe(data["train"], data["test"], trainer)


def chat_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt and its completion, as TRL makes them.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
    """
    _check_template(row, tokenizer)
    both = row["prompt"] + row["completion"]
    if isinstance(both, str):
        encoded: Any = tokenizer(f"{both}{tokenizer.eos_token or ''}")
    else:
        encoded = tokenizer.apply_chat_template(both, return_dict=True)
    return encoded["input_ids"]


def _check_template(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a conversation and a tokenizer without a chat template."""
    if not isinstance(row["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            "The data are conversations and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give columns prompt and completion of plain text."
        )


def load_trl() -> tuple[type[Trainer], type[TrainingArguments]]:
    """TRL's SFTTrainer and SFTConfig.

    Raises:
        ImportError: if TRL is not installed.
    """
    try:
        # heavy, and optional
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError("The task sft needs TRL: pip install trl") from error
    return SFTTrainer, SFTConfig


def images(
    model: PreTrainedModel, processor: BaseImageProcessor, data: DatasetDict, max_length: int = 0
) -> Recipe:
    """Image classification; the metric is accuracy.

    Images are read when they are needed; `max_length` is not used.

    Raises:
        ValueError: if the classes of the data are not the labels of the model.
    """
    check_labels(model, data)

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        colored = [image.convert("RGB") for image in rows["image"]]
        values = processor(colored, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "label": rows["label"]}

    return Recipe(
        data["train"].with_transform(pixels),
        data["test"].with_transform(pixels),
        collate=_stack,
        metrics=accuracy,
        mean_loss=True,
    )


def load_text(source: str | Path, seed: int) -> DatasetDict:
    """Running text with the splits train and test: .txt files, or tables with a column of text."""
    parts = read_splits(source)
    column = text_column(parts["train"], source)
    return with_test(parts.select_columns([column]), _TEST_SHARE, seed)


def load_chat(source: str | Path, seed: int) -> DatasetDict:
    """Prompts and completions with the splits train and test.

    The columns are prompt and completion (text or messages); messages or conversations (turns with
    role and content, or from and value; the last turn is the assistant's); or instruction, output
    and, optionally, input.

    Raises:
        ValueError: for other columns, or a conversation that does not end with an answer.
    """
    pairs = DatasetDict()
    for name, part in read_splits(source).items():
        pairs[name] = part.map(_pair, remove_columns=part.column_names, desc="Reading")
    return with_test(pairs, _TEST_SHARE, seed)


def load_images(source: str | Path, seed: int) -> DatasetDict:
    """Images with the splits train and test, columns image and label.

    The source is a folder with one folder a class, or a hub name.

    Raises:
        ValueError: if the columns image and label are missing.
    """
    if Path(source).is_dir():
        splits = load_dataset("imagefolder", data_dir=str(source))
    else:
        name, _, config = str(source).partition(":")
        splits = load_dataset(name, config or None)
    parts = pick_splits(splits, source)
    columns = parts["train"].column_names
    renamed = {old: new for old, new in _IMAGE_COLUMNS.items() if old in columns}
    parts = parts.rename_columns(renamed)
    features = parts["train"].features
    if "image" not in features or not isinstance(features.get("label"), ClassLabel):
        raise ValueError(
            f"{source} has the columns {list(features)}; needed are image, and label with classes."
        )
    return with_test(parts.select_columns(["image", "label"]), _TEST_SHARE, seed)


class Task(NamedTuple):
    """Functions and classes of a task.

    Attributes:
        load: source and seed to a `DatasetDict`.
        recipe: model, tokenizer (or image processor), data and max_length to a `Recipe`.
        model, processor: the auto classes.
    """

    load: Callable[..., DatasetDict]
    recipe: Callable[..., Recipe]
    model: type
    processor: type


TASKS: dict[TaskName, Task] = {
    "classify": Task(
        load_classification, classify, AutoModelForSequenceClassification, AutoTokenizer
    ),
    "lm": Task(load_text, language_model, AutoModelForCausalLM, AutoTokenizer),
    "sft": Task(load_chat, chat, AutoModelForCausalLM, AutoTokenizer),
    "image": Task(load_images, images, AutoModelForImageClassification, AutoImageProcessor),
}


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Model inputs instead of the columns of text, cut to `max_length` tokens, without padding."""
    columns = [name for name in ("text", "text_pair") if name in data["train"].column_names]

    def encode(rows: dict[str, list[str]]) -> BatchEncoding:
        pairs = rows["text_pair"] if "text_pair" in columns else None
        return tokenizer(rows["text"], pairs, truncation=True, max_length=max_length)

    return data.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")


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


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the test rows whose largest logit is their label."""
    logits = prediction.predictions
    if isinstance(logits, tuple):  # further outputs of the model follow
        logits = logits[0]
    correct = np.argmax(logits, axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(correct))}


def _blocks(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, list[list[int]]]:
    """Blocks of `length` tokens across the texts; the rest at the end is dropped."""
    (texts,) = rows.values()
    ids = token_stream(texts, tokenizer)
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return {"input_ids": blocks, "labels": blocks}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row as prompt and completion."""
    if "prompt" in row and "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    turns = _turns(row)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"A row has the columns {list(row)} and {len(turns)} turns; needed are prompt and "
            "completion, instruction and output, or messages of which the last is the "
            "assistant's."
        )
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a row, or its instruction and output as two turns."""
    if "instruction" in row and "output" in row:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
    return [_turn(turn) for turn in row.get("messages") or row.get("conversations") or []]


def _turn(turn: dict[str, str]) -> dict[str, str]:
    """A turn with role and content, also from a turn with from and value."""
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") or turn.get("value")
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"A turn is {turn!r}; needed are a role ({', '.join(_ROLES)}) and its content."
        )
    return {"role": _ROLES[role], "content": content}


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of images."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
