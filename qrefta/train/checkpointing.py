"""The setting `gradient_checkpointing` of a run.

In TrainingArguments selective checkpointing is the key "selective" of
`gradient_checkpointing_kwargs`, as in TRL's SFTConfig. A function would not do there, because
Trainer's loggers write the arguments as JSON.
"""

import warnings
from typing import Any

from torch import nn
from transformers import TrainingArguments

from qrefta.choices import SELECTIVE, Selective
from qrefta.model.adapters import without_peft
from qrefta.nn.checkpointing import check_checkpointing, selective_contexts


def checkpointing_settings(gradient_checkpointing: bool | Selective | None) -> dict[str, Any]:
    """The fields of TrainingArguments for a value of the setting; none for None.

    Raises:
        ValueError: for another value than True, False, "selective" or None.
    """
    if gradient_checkpointing is None:
        return {}
    check_checkpointing(gradient_checkpointing)
    if gradient_checkpointing == SELECTIVE:
        return {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {SELECTIVE: True},
        }
    return {"gradient_checkpointing": gradient_checkpointing}


def follow_arguments(model: nn.Module, arguments: TrainingArguments) -> None:
    """Let the model take the key "selective" when its checkpointing is switched on.

    Trainer switches it on, and TRL off and on again where it computes with the reference.
    `own_forward` brings the model's method back.

    Args:
        model: transformers' or PEFT's.
        arguments: of the run; without the key nothing changes.
    """
    options = arguments.gradient_checkpointing_kwargs
    if not isinstance(options, dict) or not options.get(SELECTIVE):
        return
    base = without_peft(model)
    enable = base.gradient_checkpointing_enable

    def enable_selective(
        gradient_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        options = dict(gradient_checkpointing_kwargs or {})
        options.pop(SELECTIVE, None)
        options["context_fn"] = selective_contexts
        with warnings.catch_warnings():
            # transformers 5.24 renamed the method, and calls the old name if it was replaced
            warnings.simplefilter("ignore", FutureWarning)
            enable(gradient_checkpointing_kwargs=options, **others)

    base.gradient_checkpointing_enable = enable_selective
