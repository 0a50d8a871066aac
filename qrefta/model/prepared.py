"""The mark of a prepared model: its config, which transformers keeps with the quantizer."""

from typing import Any

from torch import nn

from qrefta.hf_config import QReftaConfig
from qrefta.model.depth import present_stacks


def is_prepared(model: nn.Module) -> bool:
    return isinstance(_config(model), QReftaConfig)


def prepared_config(model: nn.Module) -> QReftaConfig:
    """The config of a prepared model, whose stacks have the layers that it has now.

    Raises:
        ValueError: if the model is not prepared, or its blocks were changed in a way that no folder
            can hold (see `qrefta.model.depth`).
    """
    config = _config(model)
    if not isinstance(config, QReftaConfig):
        raise ValueError(
            f"This {type(model).__name__} is not prepared; call qrefta.prepare(model) or "
            "qrefta.load(folder)."
        )
    config.stacks = present_stacks(model, config.stacks)  # pyright: ignore[reportArgumentType]
    return config


def quant_report(model: nn.Module) -> list[dict[str, Any]]:
    """One row a stack: how much of the quantization error preparing removed, and the cost in bytes.

    Keys: see `StackReport.report`. Errors are squared Frobenius norms over all layers of the stack.

    Raises:
        ValueError: if the model is not prepared.
    """
    return [row.report() for row in prepared_config(model).stacks]


def _config(model: nn.Module) -> Any:
    """The config of a quantized model, qrefta's or another's; None for any other model."""
    return getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
