"""A model's own methods, back after a run.

TRL puts a function for its loss, and accelerate one for autocast, in place of the forward pass of
the model object. They would stay: a deep copy would compute with the original's weights, and later
runs in the old dtype. Selective checkpointing, ours and TRL's, replaces the method that switches it
on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qrefta.model.adapters import without_peft

_NAMES = ("forward", "_original_forward", "gradient_checkpointing_enable")


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """After this context the model, and the model inside PEFT's, have the methods of before."""
    owners: list[dict[str, Any]] = [vars(model), vars(without_peft(model))]
    before = [{name: owner[name] for name in _NAMES if name in owner} for owner in owners]
    try:
        yield
    finally:
        for owner, kept in zip(owners, before, strict=True):
            for name in _NAMES:
                owner.pop(name, None)
            owner.update(kept)
