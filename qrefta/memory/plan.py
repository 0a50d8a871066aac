"""plan(): the memory that fine-tuning a model takes on a GPU, whether it fits, and changes that
make it fit.

Everything comes from the config: the model is made without storage, with adapted layers as
`prepare` makes them (`qrefta.memory.meta_model`), and a training step is counted
(`qrefta.memory.footprint`). No weight is read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import AdamW

from qrefta._compat.transformers import enable_checkpointing
from qrefta.choices import (
    AUTO_BITS,
    AUTO_RANK,
    DTYPES,
    OPTIMIZER_NAMES,
    SELECTIVE,
    Bits,
    Dtype,
    Optimizer,
    Selective,
)
from qrefta.config.call import settings_of_call, shows_settings
from qrefta.config.rank import RankSetting
from qrefta.config.settings import Settings, SettingsKeywords
from qrefta.config.sizes import parse_bytes
from qrefta.memory.footprint import count_step, counted_checkpointing, fake
from qrefta.memory.meta_model import ModelSource, Outline
from qrefta.methods import METHODS
from qrefta.model.stacks import select_stacks
from qrefta.nn.checkpointing import check_checkpointing
from qrefta.nn.head_loss import linear_head
from qrefta.split.allocate import given_ranks

OPTIMIZERS: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    # As on CUDA, where one call updates all parameters, with one more copy of them on the way.
    "adamw": partial(AdamW, foreach=True),
    "adamw_8bit": AdamW8bit,
}
_TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MOST_BATCH = 1 << 20


class Saving(NamedTuple):
    """A change of the settings, and the bytes of the total that it saves."""

    change: str
    saved_bytes: int


@dataclass(frozen=True)
class Plan:
    """Memory of a training step at its peak; `total_bytes` is the sum of the first six.

    Attributes:
        linears_bytes: linear layers of the blocks: packed weights and scales.
        rest_bytes: everything that stays dense: embeddings, norms, biases, heads, buffers.
        factors_bytes: factors of all stacks, trainable parameters as float32 masters.
        optimizer_bytes: state of the optimizer.
        activations_bytes: activations that the forward pass keeps for the backward pass, inputs
            included.
        temporary_bytes: temporary tensors at the peak: gradients, dequantized weights, logits in
            float32 and others.
        gradients_bytes: gradients of all trainable parameters after the backward pass.
        available_bytes: memory of the GPU minus the reserve; None without a GPU.
        largest_batch, largest_rank: the largest that fits with all other settings unchanged; 0 if
            not even 1 fits. None without a GPU; the rank is also None if it is not one number, and
            with bits="auto", where a larger rank leaves fewer bits to the weights.
        savings: changes that take less memory, the largest saving first; empty if it fits.
    """

    linears_bytes: int
    rest_bytes: int
    factors_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    temporary_bytes: int
    gradients_bytes: int
    available_bytes: int | None = None
    largest_batch: int | None = None
    largest_rank: int | None = None
    savings: tuple[Saving, ...] = ()

    @property
    def total_bytes(self) -> int:
        model = self.linears_bytes + self.rest_bytes + self.factors_bytes
        return model + self.optimizer_bytes + self.activations_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether the total is available; true without a GPU."""
        return self.available_bytes is None or self.total_bytes <= self.available_bytes


@shows_settings
def plan(
    model: ModelSource,
    *,
    batch: int = 1,
    seq: int | None = None,
    gpu: int | str | None = None,
    reserve: int | str = "1GB",
    dtype: Dtype | None = None,
    gradient_checkpointing: bool | Selective = False,
    whole_logits: bool = False,
    optimizer: Optimizer = "adamw",
    trust_remote_code: bool = False,
    bits: Bits = 4,
    rank: RankSetting = AUTO_RANK,
    **settings: Unpack[SettingsKeywords],
) -> Plan:
    """Memory of a training step of the model that `prepare` would make, and whether it fits on a
    GPU.

    It counts the tensors that torch's allocator holds in a step after the first, without padding
    masks and without gradient accumulation (which adds `gradients_bytes` at most). It does not
    count memory outside the allocator (the context and libraries of CUDA, about half a GB),
    workspaces, and fragmentation. `reserve` is for those.

    Args:
        model: hub name or folder of a dense model, whose config.json alone is read; its config; or
            the model, whose weights may be on the meta device.
        batch: sequences, or images, of one pass.
        seq: tokens of a sequence; in an encoder-decoder on both sides. None for images, whose size
            the config states.
        gpu: memory of the GPU, in bytes or as text: "24GB" (10^9 bytes), "24GiB".
        reserve: memory left to everything that is not counted.
        dtype: bfloat16, float16 or float32 for dense parameters and computation; None: the dtype of
            the model.
        gradient_checkpointing: recompute the activations of the blocks in the backward pass instead
            of keeping them; "selective": all but the results of attention.
        whole_logits: count the logits of all tokens of a language model, which a plain Trainer and
            the tasks dpo and grpo of `finetune` make. Its tasks lm and sft do not; for these all
            tokens count as labelled.
        optimizer: adamw or adamw_8bit.
        trust_remote_code: whether to run code that comes with a model given by name.
        bits, rank, settings: see `qrefta.Settings`; a `RankBudget` must be of trainable
            parameters. With bits="auto" the weights count as many bytes as `target_bits` allows.

    Raises:
        ValueError: for a setting that is not allowed, or a model that takes neither text nor
            images, is quantized already, or cannot be counted since its code depends on values.
        TypeError: for an unknown keyword.
    """
    chosen = settings_of_call("plan", {"bits": bits, "rank": rank, **settings})
    available = None if gpu is None else _available(gpu, reserve)
    outline = Outline.of(model, chosen.modules_to_save, trust_remote_code=trust_remote_code)
    case = _Case(
        batch,
        seq,
        dtype or _dtype_name(outline.model.dtype),
        gradient_checkpointing,
        whole_logits,
        optimizer,
        chosen,
    )
    planned = _plan(outline, case)
    if available is None:
        return planned
    planned = replace(
        planned,
        available_bytes=available,
        largest_batch=_largest_batch(outline, case, planned, available),
        largest_rank=_largest_rank(outline, case, planned, available),
    )
    if planned.fits:
        return planned
    return replace(planned, savings=_savings(outline, case, planned.total_bytes))


def _available(gpu: int | str, reserve: int | str) -> int:
    available = parse_bytes("gpu", gpu) - parse_bytes("reserve", reserve)
    if available <= 0:
        raise ValueError(
            f"gpu is {gpu!r} and reserve {reserve!r}: nothing is left; give a smaller reserve"
        )
    return available


def _dtype_name(dtype: torch.dtype) -> Dtype:
    return next(name for name, known in _TORCH_DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class _Case:
    """A training step: the arguments of `plan`."""

    batch: int
    seq: int | None
    dtype: Dtype
    gradient_checkpointing: bool | Selective
    whole_logits: bool
    optimizer: Optimizer
    settings: Settings

    def with_settings(self, **changes: Any) -> "_Case":
        """The case with other settings."""
        return replace(self, settings=replace(self.settings, **changes))


def _plan(outline: Outline, case: _Case) -> Plan:
    """The plan of one case, without a GPU."""
    _check_choice("dtype", case.dtype, DTYPES)
    _check_choice("optimizer", case.optimizer, OPTIMIZER_NAMES)
    check_checkpointing(case.gradient_checkpointing)
    dtype = _TORCH_DTYPES[case.dtype]
    inputs = outline.inputs(case.batch, case.seq, dtype)
    model, sizes = outline.prepared(case.settings, dtype)
    if case.gradient_checkpointing:
        selective = case.gradient_checkpointing == SELECTIVE
        enable_checkpointing(model, counted_checkpointing(selective))
    fake(model.train())
    try:
        whole = case.whole_logits or model.config.is_encoder_decoder
        head = None if whole else linear_head(model)
        step = count_step(model, inputs, OPTIMIZERS[case.optimizer], outline.blocks, head)
    except (RuntimeError, TypeError, AttributeError) as error:  # from the code of the model
        raise ValueError(
            f"{type(model).__name__} cannot be counted on zeros for {', '.join(inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Plan(
        linears_bytes=sizes.linears,
        rest_bytes=sizes.rest,
        factors_bytes=sizes.factors,
        optimizer_bytes=step.optimizer,
        activations_bytes=step.kept,
        temporary_bytes=step.peak - step.kept - step.optimizer,
        gradients_bytes=sum(parameter.nbytes for parameter in trainable),
    )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _largest_batch(outline: Outline, case: _Case, planned: Plan, available: int) -> int:
    def total(batch: int) -> int:
        return _plan(outline, replace(case, batch=batch)).total_bytes

    without = planned.total_bytes - planned.activations_bytes - planned.temporary_bytes
    return _largest(total, available, without, _Tried(case.batch, planned.total_bytes), _MOST_BATCH)


def _largest_rank(outline: Outline, case: _Case, planned: Plan, available: int) -> int | None:
    rank = _rank_of_all(outline, case.settings)
    if rank is None:
        return None

    def total(rank: int) -> int:
        return _plan(outline, case.with_settings(rank=rank)).total_bytes

    method = METHODS[case.settings.method]
    targets = select_stacks(outline.stacks, case.settings.target_modules)
    most = min(method.largest_rank(*stack.shape) for stack in targets)
    without = planned.total_bytes - planned.factors_bytes - planned.optimizer_bytes
    return _largest(total, available, without, _Tried(rank, planned.total_bytes), most)


def _rank_of_all(outline: Outline, settings: Settings) -> int | None:
    """The rank that all target stacks have; None if they differ or it is not one number, and if the
    bits depend on it.
    """
    if settings.bits == AUTO_BITS:
        return None
    targets = select_stacks(outline.stacks, settings.target_modules)
    ranks = set(given_ranks(targets, settings).values())
    (rank,) = ranks if len(ranks) == 1 else (None,)
    return rank if isinstance(rank, int) else None


class _Tried(NamedTuple):
    """A number of rows or components, and the bytes of a step with it."""

    number: int
    total: int


def _largest(
    total: Callable[[int], int], available: int, without: int, asked: _Tried, most: int
) -> int:
    """The largest number whose total is available, or 0.

    Args:
        total: bytes by number. They grow about linearly, and the line through the last two says
            which number to try.
        available: bytes.
        without: about the total of 0.
        asked: the number of the plan.
        most: larger numbers are not tried.
    """
    before = _Tried(0, without)
    last = asked
    fits = 0
    too_large = last.number
    if last.total <= available:
        fits = last.number
        too_large = most + 1
    while too_large - fits > 1:
        # From 0, as from rank 0, there is no line yet.
        further = last.number - before.number
        slope = (last.total - before.total) / further if further else 0
        guess = last.number + math.floor((available - last.total) / slope) if slope > 0 else most
        tried = min(max(guess, fits + 1), too_large - 1)
        before = last
        last = _Tried(tried, total(tried))
        if last.total <= available:
            fits = tried
        else:
            too_large = tried
    return fits


def _savings(outline: Outline, case: _Case, total: int) -> tuple[Saving, ...]:
    """Single changes that lower the total, the largest saving first."""
    savings = [
        Saving(change, total - _plan(outline, changed).total_bytes)
        for change, changed in _changes(outline, case).items()
    ]
    helpful = [saving for saving in savings if saving.saved_bytes > 0]
    return tuple(sorted(helpful, key=lambda saving: -saving.saved_bytes))


def _changes(outline: Outline, case: _Case) -> dict[str, _Case]:
    """Changes of one setting that may save memory, by their words."""
    settings = case.settings
    changes = {}
    if outline.model.supports_gradient_checkpointing:
        before = case.gradient_checkpointing
        if not before:
            selective = replace(case, gradient_checkpointing=SELECTIVE)
            changes["selective gradient checkpointing"] = selective
        if before is not True:
            changes["gradient checkpointing"] = replace(case, gradient_checkpointing=True)
    if case.batch > 1:
        changes[f"batch {case.batch // 2}"] = replace(case, batch=case.batch // 2)
    if case.seq is not None and case.seq > 1:
        changes[f"seq {case.seq // 2}"] = replace(case, seq=case.seq // 2)
    rank = _rank_of_all(outline, settings)
    if rank is not None and rank > 1:
        half = rank // 2
        changes[f"rank {half}"] = case.with_settings(rank=half)
    if case.optimizer == "adamw":
        changes["optimizer adamw_8bit"] = replace(case, optimizer="adamw_8bit")
    if settings.bits == 16:
        changes["bits 4"] = case.with_settings(bits=4)
    elif settings.bits != AUTO_BITS and not settings.double_quant:
        changes["double_quant"] = case.with_settings(double_quant=True)
    if case.dtype == "float32":
        changes["dtype bfloat16"] = replace(case, dtype="bfloat16")
    return changes
