"""Stacks that do not learn: no gradient reaches their factors."""

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from qrefta.config.stack import BANK
from qrefta.model.prepared import is_prepared
from qrefta.nn.bank import FactorBank


def silent_stacks(model: nn.Module) -> list[str]:
    """Names of the stacks whose factors train and have no gradient.

    Call it after a backward pass and before `zero_grad`.
    """
    bank: FactorBank | None = getattr(model, BANK, None)
    if bank is None:
        return []
    return [
        bank.names[key]
        for key, factors in bank.items()
        if bank.names[key] not in bank.frozen()
        and all(parameter.grad is None for parameter in factors.parameters())
    ]


class GradientWatch(TrainerCallback):
    """Warns once of every stack whose factors get no gradient in a step.

    Frozen factors are told of in the first forward pass. `qrefta.finetune` uses it. For another
    Trainer: `Trainer(..., callbacks=[GradientWatch()])`.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, *_: Any, model: nn.Module, **__: Any
    ) -> None:
        names = [name for name in silent_stacks(model) if name not in self._known]
        self._known.update(names)
        if names and state.is_world_process_zero:
            warnings.warn(
                f"In step {state.global_step + 1} the factors of {', '.join(names)} got no "
                "gradient and did not learn. Likely reasons: the batch did not pass through "
                "their layers (a tower or experts that it does not use), the loss leaves out "
                "their output, or it is detached.",
                stacklevel=2,
            )


def check_trainable(model: nn.Module) -> None:
    """Refuse to train a model without a trainable parameter.

    Raises:
        ValueError: naming the likely reason.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    reason = "all parameters are frozen; leave out the code that set requires_grad to False"
    if is_prepared(model) and not len(getattr(model, BANK)):
        reason = "it was prepared with rank=0, which only quantizes; prepare it with a rank above 0"
    raise ValueError(f"The model has no trainable parameter: {reason}.")
