"""PEFT's adapters on a model, and the model inside PEFT's."""

from typing import Any

from torch import nn


def check_no_peft(model: nn.Module) -> None:
    """Refuse a model with PEFT adapters, which are no part of a prepared model.

    Raises:
        ValueError: if it has any, or is PEFT's.
    """
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(
            "The model carries PEFT adapters; call merge_and_unload() on the PEFT model first. Its "
            "own save_pretrained writes the adapters alone."
        )


def without_peft(model: Any) -> Any:
    """The model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
