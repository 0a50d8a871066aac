"""Tasks of a fine-tuning run: rows to train and test on, batches of them, and the Trainer class.

A task is one file: `classify` (text with labels), `lm` (running text), `chat` (the task sft:
conversations, or prompts with completions), `dpo` (pairs of answers), `grpo` (prompts and a reward)
and `image` (images with labels).
"""

from collections.abc import Callable
from typing import NamedTuple

from datasets import DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from qrefta.choices import Task as TaskName
from qrefta.train.data import labelled_texts, load_classification
from qrefta.train.tasks.chat import chat_recipe, conversations, load_chat
from qrefta.train.tasks.classify import text_classes
from qrefta.train.tasks.dpo import dpo_recipe, load_preferences, preferences
from qrefta.train.tasks.grpo import grpo_recipe, load_prompts, prompts
from qrefta.train.tasks.image import image_classes, labelled_images, load_images
from qrefta.train.tasks.lm import documents, load_text, text_windows
from qrefta.train.tasks.recipe import Recipe

__all__ = [
    "TASKS",
    "Recipe",
    "Task",
    "TaskName",
    "load_chat",
    "load_images",
    "load_preferences",
    "load_prompts",
    "load_text",
]


class Task(NamedTuple):
    """Functions and classes of a task.

    Attributes:
        load: source and seed to a `DatasetDict`.
        rows: the same of splits in memory, their name and the seed.
        recipe: model, tokenizer (or image processor), data and max_length to a `Recipe`.
        model: the auto class.
    """

    load: Callable[..., DatasetDict]
    rows: Callable[[DatasetDict, str, int], DatasetDict]
    recipe: Callable[..., Recipe]
    model: type

    @property
    def trains_head(self) -> bool:
        """Whether the model has a head of the data's classes, which trains in float32."""
        return self.model is not AutoModelForCausalLM


TASKS: dict[TaskName, Task] = {
    "classify": Task(
        load_classification, labelled_texts, text_classes, AutoModelForSequenceClassification
    ),
    "lm": Task(load_text, documents, text_windows, AutoModelForCausalLM),
    "sft": Task(load_chat, conversations, chat_recipe, AutoModelForCausalLM),
    "dpo": Task(load_preferences, preferences, dpo_recipe, AutoModelForCausalLM),
    "grpo": Task(load_prompts, prompts, grpo_recipe, AutoModelForCausalLM),
    "image": Task(load_images, labelled_images, image_classes, AutoModelForImageClassification),
}
