"""Whether a model's class does a task: with another head the loss means something else, or fails
deep in the model's code.
"""

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from qrefta.choices import Task
from qrefta.model.adapters import without_peft
from qrefta.model.causal import is_causal

_CLASSIFIERS = {
    "classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def check_class(model: Any, task: Task) -> None:
    """Refuse a model that does not do a task. A classifier outside of transformers is trusted, and
    a language model needs no method generate.

    Raises:
        ValueError: for a classifier of another kind, or a model for lm, sft, dpo or grpo that is no
            causal language model.
    """
    base = without_peft(model)
    kind = type(base)
    from_transformers = kind.__module__.startswith("transformers.")
    if task not in _CLASSIFIERS:
        if not is_causal(base, must_generate=from_transformers):
            raise ValueError(
                f"The model is a {kind.__name__}, and the task {task} trains a causal language "
                "model, which predicts the next token of a text and does not see it. Give one, "
                "such as AutoModelForCausalLM loads of a decoder; an encoder (BERT) is one only "
                "with is_decoder=True in its config."
            )
        return
    names = {name for value in _CLASSIFIERS[task].values() for name in _names(value)}
    if from_transformers and not any(parent.__name__ in names for parent in kind.__mro__):
        auto = "ImageClassification" if task == "image" else "SequenceClassification"
        raise ValueError(
            f"The model is a {kind.__name__}, and the task {task} trains a model with a head for "
            f"classes, as AutoModelFor{auto} loads it. Load it so, or choose another task."
        )


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a kind of model, one or several."""
    return (value,) if isinstance(value, str) else tuple(value)
