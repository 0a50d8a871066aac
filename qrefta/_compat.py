"""Names that differ between the supported versions of transformers."""

from typing import Any

from transformers import PreTrainedModel


def enable_checkpointing(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Switch on gradient checkpointing.

    transformers 5.24 renamed it to activation checkpointing and warns about the old name.

    Args:
        model: whose blocks recompute their activations in the backward pass.
        options: keywords of `torch.utils.checkpoint.checkpoint`; default: transformers'.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
