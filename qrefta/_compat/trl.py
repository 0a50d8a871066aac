"""Names inside TRL, in release 1.16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

__all__ = ["loads_instead"]


@contextmanager
def loads_instead(reference: PreTrainedModel) -> Iterator[None]:
    """A context in which GRPOTrainer takes `reference` where it would load one.

    DPOTrainer has an argument for it, GRPOTrainer none. If it goes: make the trainer with beta 0,
    then set its beta and ref_model.
    """
    import trl.trainer.grpo_trainer  # heavy, and optional

    grpo_trainer: Any = trl.trainer.grpo_trainer
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: reference
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
