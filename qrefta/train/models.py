"""Models of a task's class, with a head for the classes of its data."""

import reprlib
import warnings
from typing import Literal

import torch
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from qrefta.choices import Task
from qrefta.files.sources import pretrained_source
from qrefta.train.task_class import check_class
from qrefta.train.tasks import TASKS
from qrefta.train.tasks.classify import (
    SINGLE_LABEL,
    label_names,
    names_of_labels,
    warn_of_new_names,
)
from qrefta.train.tasks.mixture import Mixture


def load_model(
    source: str,
    task: Task,
    data: DatasetDict | Mixture,
    seed: int,
    trust_remote_code: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> PreTrainedModel:
    """A model of the task's class, with a head for the classes of the data where it has them.

    Args:
        source: folder, hub name or GGUF file.
        task: of the run.
        data: of the run, for its classes.
        seed: of a head that is drawn.
        trust_remote_code: whether to run code that comes with the model.
        dtype: of a language model; "auto": as it is stored. A classifier is float32.

    Raises:
        ValueError: if the class of the checkpoint is no causal language model, and the task needs
            one.
    """
    kind = TASKS[task].model
    if not TASKS[task].trains_head:
        named = pretrained_source(source, trust_remote_code)
        model = kind.from_pretrained(**named, dtype=dtype, use_safetensors=True)
        check_class(model, task)
        return model
    assert isinstance(data, DatasetDict)  # several data sets are for language models
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

    Its head is drawn from `seed` if the checkpoint has none that fits; a warning tells if it has
    one that does not, and if labels with names get other names. A row has one class, also if
    the checkpoint was trained on several a row, or on numbers.
    """
    source = pretrained_source(model, trust_remote_code)
    config = AutoConfig.from_pretrained(**source)
    fits = config.num_labels == len(classes)
    names = label_names(config, classes) if fits else classes
    if _has_head(config, auto):
        _tell_of_labels(model, config, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_pretrained(
            **source,
            dtype=torch.float32,  # a head in bf16 would lose most of AdamW's updates
            use_safetensors=True,
            num_labels=len(classes),
            problem_type=SINGLE_LABEL,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            ignore_mismatched_sizes=not fits,
        )


def _has_head(config: PreTrainedConfig, auto: type) -> bool:
    """Whether a checkpoint is of a class with the head that `auto` loads."""
    ending = auto.__name__.removeprefix("AutoModel")
    return any(name.endswith(ending) for name in config.architectures or ())


def _tell_of_labels(model: str, config: PreTrainedConfig, names: list[str]) -> None:
    """Warn of a trained head that is left out, or whose labels get other names."""
    before = names_of_labels(config)
    if config.num_labels == len(names):
        warn_of_new_names(before, names)
        return
    warnings.warn(
        f"{model} has the labels {reprlib.repr(before or config.num_labels)}, and the data have "
        f"the classes {reprlib.repr(names)}: its trained head is left out, and a new one is drawn.",
        stacklevel=4,
    )
