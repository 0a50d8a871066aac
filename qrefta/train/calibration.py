"""The training rows of a task -> batches to calibrate with, before the model is prepared."""

import random
import warnings
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import BaseImageProcessor, PreTrainedModel

from qrefta.choices import Task
from qrefta.model.positions import trained_positions
from qrefta.split.texts import BATCH_TOKENS, ROWS, TOKENS, batches_by_length, padded_batches
from qrefta.train.lengths import row_length
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.classify import text_classes
from qrefta.train.tasks.image import image_classes
from qrefta.train.tasks.lm import text_windows
from qrefta.train.tasks.mixture import Mixture
from qrefta.train.tasks.prompts import token_ids

IMAGES = 128  # an image has some 200 tokens
IMAGE_BATCH = 16


def task_batches(
    task: Task,
    model: PreTrainedModel,
    processor: Any,
    data: DatasetDict | Mixture,
    *,
    max_length: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """Batches of the training split, processed as `qrefta.finetune` processes them for the task.

    They hold ROWS rows, or fewer with TOKENS tokens in all; for images, IMAGES of them. Packing of
    sft leaves the tokens as they are, so conversations are not packed here. For dpo the rows are
    prompts with their better answers, for grpo prompts.

    Example:
        batches = task_batches("classify", model, tokenizer, data)
        model = qrefta.prepare(model, calibration=batches)

    Args:
        task: one of `qrefta.choices.TASK_NAMES`.
        model: of the task's class, to be prepared.
        processor: the model's tokenizer; for images its image processor.
        data: from the task's loader, see `qrefta.finetune`.
        max_length: tokens of a row, as in `qrefta.finetune`; prompts of grpo are not cut to it.
        seed: of the choice of rows.

    Raises:
        ValueError: if the labels of the data are not the labels of the model, conversations meet
            a tokenizer without a chat template, or the model has fewer positions than `max_length`.
    """
    if isinstance(data, Mixture):
        return _mixed_batches(task, model, processor, data, max_length, seed)
    length = 0 if task == "image" else row_length(model, processor, max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run tells it, of all rows
        return _task_batches(task, model, processor, data, length, seed)


def _task_batches(
    task: Task, model: PreTrainedModel, processor: Any, data: DatasetDict, length: int, seed: int
) -> list[Any]:
    """Batches of a task's training rows, of `length` tokens at most."""
    train = data["train"]
    if task == "lm":
        windows = text_windows(model, processor, data, length).train
        return _window_batches(_sample(windows, max(1, TOKENS // length), seed))
    sample = _sample(train, IMAGES if task == "image" else ROWS, seed)
    # A recipe has two splits.
    splits = DatasetDict({"train": sample, "test": sample})
    if task == "image":
        return _image_batches(model, processor, splits)
    if task in ("dpo", "grpo"):
        answer = task == "dpo"
        # the length of grpo is of answers, and prompts are whole
        most = length if answer else trained_positions(model)
        ids = [token_ids(dict(row), processor, answer)[:most] for row in sample]
        return padded_batches(_within([{"input_ids": row} for row in ids]), processor)
    if task == "sft":
        rows = chat_recipe(model, processor, splits, length).train
        return padded_batches(_within([{"input_ids": ids} for ids in rows["input_ids"]]), processor)
    recipe = text_classes(model, processor, splits, length)
    assert recipe.collate is not None, "text with labels has a collator"
    tokenized: list[Any] = list(recipe.train)
    return batches_by_length(_within(tokenized), recipe.collate)


def _mixed_batches(
    task: Task,
    model: PreTrainedModel,
    processor: Any,
    mixture: Mixture,
    max_length: int | None,
    seed: int,
) -> list[Any]:
    """Batches of every data set, as many of each as its share of the weights."""
    total = sum(mixture.weights)
    batches = []
    for data, weight in zip(mixture.parts, mixture.weights, strict=True):
        own = task_batches(task, model, processor, data, max_length=max_length, seed=seed)
        batches += own[: max(1, round(len(own) * weight / total))]
    return batches


def _sample(train: Dataset, count: int, seed: int) -> Dataset:
    """Rows chosen by the seed, in order; all, if there are fewer."""
    count = min(count, len(train))
    return train.select(sorted(random.Random(seed).sample(range(len(train)), count)))


def _within(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first rows that have TOKENS tokens together, at least one row."""
    kept = []
    room = TOKENS
    for row in rows:
        room -= len(row["input_ids"])
        if kept and room < 0:
            break
        kept.append(row)
    return kept


def _window_batches(windows: Dataset) -> list[Any]:
    """Batches of windows of equal length, with BATCH_TOKENS tokens or one window."""
    ids = torch.tensor(windows["input_ids"])
    return [{"input_ids": part} for part in ids.split(max(1, BATCH_TOKENS // ids.shape[1]))]


def _image_batches(
    model: PreTrainedModel, processor: BaseImageProcessor, some: DatasetDict
) -> list[Any]:
    """Batches of images, by the collator of the task."""
    recipe = image_classes(model, processor, some)
    assert recipe.collate is not None, "images have a collator"
    rows = [recipe.train[index] for index in range(len(recipe.train))]
    starts = range(0, len(rows), IMAGE_BATCH)
    return [recipe.collate(rows[start : start + IMAGE_BATCH]) for start in starts]
