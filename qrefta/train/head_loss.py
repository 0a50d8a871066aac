"""Cross-entropy of a language model without whole logits.

The logits of a batch are the largest tensor of a training step: tokens times 49,000 to 262,000
words. Here they are made for a few tokens at a time, and for tokens with a label only. The gradient
of the hidden states is computed from them at once, so the backward pass needs no logits.

The model's own forward pass runs, with everything around the head (a mixture's auxiliary loss, DDP,
FSDP): while it runs, the head returns the hidden states as they are, and the model's loss function
is `head_cross_entropy`. A model that caps its logits keeps its own loss.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

IGNORED = -100  # as a label: no loss
CHUNK = 128  # tokens whose logits exist at a time
_TOLERANCE = 1e-2  # of the loss that a model's own loss function gives; far above rounding


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor | int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of labelled tokens, divided by `count`; float32, nats.

    Args:
        hidden: (tokens, hidden size).
        weight: of the head, (words, hidden size).
        bias: of the head, (words), or None.
        labels: (tokens); -100 for none.
        count: divisor; None: the number of labelled tokens.
    """
    labelled = labels != IGNORED
    divisor = labelled.sum() if count is None else torch.as_tensor(count, device=hidden.device)
    total = _HeadLoss.apply(hidden[labelled], weight, bias, labels[labelled])
    assert isinstance(total, Tensor)
    return total / divisor.clamp(min=1)


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies; the forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad
        gradients: list[Tensor | None] = [
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,
            None if bias is None or not needed[2] else torch.zeros_like(bias, dtype=torch.float32),
        ]
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                logits = nn.functional.linear(hidden[part].to(dtype), head)
                logits = logits.float() if bias is None else logits.float() + bias
                total += _of_chunk(logits, labels[part])
                if any(needed[:3]):
                    _add_gradients(gradients, logits, hidden[part], head, part)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if tensor is None else (tensor * gradient).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def _of_chunk(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies; `logits` becomes their gradient, in place."""
    rows = torch.arange(len(labels), device=labels.device)
    norms = logits.logsumexp(dim=1, keepdim=True)
    loss = (norms[:, 0] - logits[rows, labels]).sum()
    logits.sub_(norms).exp_()
    logits[rows, labels] -= 1
    return loss


def _add_gradients(
    gradients: list[Tensor | None], of_logits: Tensor, hidden: Tensor, head: Tensor, part: slice
) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias += of_logits.sum(dim=0)
    of_logits = of_logits.to(head.dtype)
    if of_hidden is not None:
        of_hidden[part] = of_logits @ head
    if of_weight is not None:
        of_weight += of_logits.T @ hidden.to(head.dtype)


def has_plain_head(model: Any) -> bool:
    """Whether the model's loss is the cross-entropy of its head's output, tried on a few tokens.

    Models differ that cap their logits, and models whose code does not call the loss function of
    transformers.
    """
    base = causal_model_of(model)
    head = None if base is None else base.get_output_embeddings()
    if base is None or type(head) is not nn.Linear or "forward" in vars(head):
        return False  # a wrapped head, or one that accelerate moves between devices
    if getattr(base.config.get_text_config(), "final_logit_softcapping", None):
        return False  # small logits would pass the trial
    tokens = torch.arange(1, 9, device=base.device)[None] % base.config.get_text_config().vocab_size
    inputs = {"input_ids": tokens, "labels": tokens} | _without_cache(base)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = model(**inputs).loss
            with plain_head(base):
                ours = model(**inputs).loss
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # a loss in the model's own code, which takes logits
    finally:
        model.train(training)
    return own is not None and bool((own - ours).abs() <= _TOLERANCE * own.abs())


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if has_cache else {}


def causal_model_of(model: Any) -> PreTrainedModel | None:
    """The transformers model inside PEFT's; None if there is none with a head and a loss."""
    base = without_peft(model)
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        return None
    return base


def without_peft(model: Any) -> Any:
    """The model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def plain_head(model: PreTrainedModel) -> Iterator[None]:
    """The model's head returns its input, and the model's loss is `head_cross_entropy` of it."""
    head: Any = model.get_output_embeddings()
    own_loss = model.loss_function

    def loss(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        hidden = logits.reshape(-1, logits.shape[-1])
        targets = shift_labels.reshape(-1).to(hidden.device)
        weight, bias = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for tensor in (head.weight, head.bias)
        )
        return head_cross_entropy(hidden, weight, bias, targets, num_items_in_batch)

    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        del head.forward
        model.loss_function = own_loss


def without_logits(kind: type[Trainer]) -> type[Trainer]:
    """A subclass of the Trainer whose causal language models make no whole logits.

    The Trainer's own loss remains where it needs logits (metrics, label smoothing, a loss function
    of the caller), and for models without a plain head.
    """

    class WithoutLogits(kind):
        """Computes the loss by `head_cross_entropy`."""

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
            model = self.model
            assert isinstance(model, nn.Module)
            if self._has_plain_head is None:
                self._has_plain_head = has_plain_head(model)
            return causal_model_of(model) if self._has_plain_head else None

    return WithoutLogits
