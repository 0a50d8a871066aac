"""Models of a task's class, with a head for the classes of its data."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from qrefta.choices import Task
from qrefta.files.sources import pretrained_source
from qrefta.train.tasks import TASKS

if TYPE_CHECKING:
    from datasets import DatasetDict


def load_model(
    source: str, task: Task, data: "DatasetDict", seed: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of the task's class, with a head for the classes of the data where it has them."""
    kind = TASKS[task].model
    if task not in ("classify", "image"):
        named = pretrained_source(source, trust_remote_code)
        return kind.from_pretrained(**named, dtype="auto", use_safetensors=True)
    classes = data["train"].features["label"].names
    return load_classifier(source, classes, seed, kind, trust_remote_code)


def load_classifier(
    model: str,
    classes: list[str],
    seed: int,
    auto: type = AutoModelForSequenceClassification,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A classifier for these classes, of the class `auto`.

    Its head is drawn from `seed` if the checkpoint has none that fits.
    """
    source = pretrained_source(model, trust_remote_code)
    has_labels = AutoConfig.from_pretrained(**source).num_labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_pretrained(
            **source,
            dtype=torch.float32,  # a head in bf16 would lose most of AdamW's updates
            use_safetensors=True,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
            ignore_mismatched_sizes=has_labels != len(classes),
        )
