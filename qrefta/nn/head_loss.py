"""Cross-entropy of a language model without whole logits.

The logits of a batch are the largest tensor of a training step: tokens times 49,000 to 262,000
words. Here they are made for a few tokens at a time, and for tokens with a label only. The gradient
of the hidden states is computed from them at once, so the backward pass needs no logits.

The model's own forward pass runs, with everything around the head (a mixture's auxiliary loss, DDP,
FSDP): while it runs, the head returns the hidden states as they are, and the model's loss function
is `head_cross_entropy`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qrefta.nn.first_order import first_order

IGNORED = -100  # as a label: no loss
# a cap of logits, by its names in the configs of models
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
CHUNK = 128  # tokens whose logits exist at a time


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
    total = summed_cross_entropy(hidden[labelled], weight, bias, labels[labelled])
    return total / divisor.clamp(min=1)


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunks: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of tokens that all have a label; see `head_cross_entropy`.

    With `chunks`, only the first chunks are computed: enough to count the memory, since every
    chunk makes and frees the same bytes.
    """
    total = _HeadLoss.apply(hidden, weight, bias, labels, chunks)
    assert isinstance(total, Tensor)
    return total


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies; the forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunks: int | None,
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
            for start in range(0, len(hidden), CHUNK)[:chunks]:
                part = slice(start, start + CHUNK)
                logits = nn.functional.linear(hidden[part].to(dtype), head)
                logits = logits.float() if bias is None else logits.float() + bias
                total += _of_chunk(logits, labels[part])
                if any(needed[:3]):
                    _add_gradients(gradients, logits, hidden[part], head, part)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if tensor is None else (tensor * gradient).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


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


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head whose output a language model's loss takes as it is; None if there is none such.

    Not every model with such a head computes its loss by transformers' function.
    """
    if not model.can_generate():
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None  # a wrapped head, or one that accelerate moves between devices
    config = model.config.get_text_config()
    return None if any(getattr(config, name, None) for name in _CAPS) else head


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
