"""Training of causal language models without whole logits (`qrefta.nn.head_loss`).

A model that caps its logits, or computes its loss in code of its class, keeps its own loss.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from qrefta.model.adapters import without_peft
from qrefta.model.modes import eval_mode
from qrefta.nn.head_loss import linear_head, plain_head

_TOLERANCE = 1e-2  # of the values that a model's own code gives; far above rounding
_SCALE = 1000.0  # of logits, so that a few tokens' logits are above any cap


def has_plain_head(model: Any) -> bool:
    """Whether the model's loss is the cross-entropy of its head's output, tried on a few tokens.

    Models differ that cap their logits, and models whose code does not call the loss function of
    transformers. A cap shows in large logits only, so the head is tried with its output scaled up.
    """
    base = causal_model_of(model)
    if base is None or linear_head(base) is None:
        return False
    tokens = torch.arange(1, 9, device=base.device)[None] % base.config.get_text_config().vocab_size
    inputs = {"input_ids": tokens, "labels": tokens} | _without_cache(base)
    try:
        with eval_mode(model), torch.no_grad():
            own = model(**inputs)
            with plain_head(base):
                ours = model(**inputs)
            with _scaled_head(base):
                scaled = model(**inputs)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # a loss in the model's own code, which takes logits
    return own.loss is not None and all(
        bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
        for one, other in ((own.loss, ours.loss), (_SCALE * own.logits, scaled.logits))
    )


@contextmanager
def _scaled_head(model: PreTrainedModel) -> Iterator[None]:
    """The head's output is `_SCALE` times as large."""
    head: Any = model.get_output_embeddings()
    compute = head.forward
    head.forward = lambda hidden: _SCALE * compute(hidden).float()
    try:
        yield
    finally:
        del head.forward


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if has_cache else {}


def causal_model_of(model: Any) -> PreTrainedModel | None:
    """The transformers model inside PEFT's; None if there is none with a head and a loss."""
    base = without_peft(model)
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        return None
    return base


class WithoutLogits(Trainer):
    """A Trainer whose causal language models make no whole logits; put it before another in the
    bases of a class.

    It computes the loss by `head_cross_entropy`. The Trainer's loss remains where it needs logits
    (metrics, label smoothing, a loss function of the caller), and for models without a plain head.
    """

    _has_plain_head: bool | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        base = self._plain_model()
        if base is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, **_without_cache(base)}
        if "cu_seq_lens_q" in inputs:  # with a cache the joined rows would see each other
            inputs["use_cache"] = False
        with plain_head(base):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _plain_model(self) -> PreTrainedModel | None:
        """The model inside PEFT's, if its loss needs no logits; else None."""
        needs_logits = (self.compute_metrics, self.label_smoother, self.compute_loss_func)
        if any(needs_logits) or getattr(self.args, "loss_type", "nll") != "nll":
            return None
        if getattr(self, "aux_loss_enabled", False):
            return None  # SFTTrainer weighs the loss of a mixture's router itself
        if self.args.n_gpu > 1:
            return None  # DataParallel's copies have heads on other devices
        model = self.model
        assert isinstance(model, nn.Module)
        if self._has_plain_head is None:
            self._has_plain_head = has_plain_head(model)
        return causal_model_of(model) if self._has_plain_head else None
