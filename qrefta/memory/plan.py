"""plan(): what fine-tuning a model takes of a GPU's memory, what fits on it, and what to change if it does not.

All comes from the config: the model is made without storage, with adapted layers as `prepare` makes them
(`qrefta.memory.meta_model`), and a training step is counted (`qrefta.memory.footprint`). No weight is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
from accelerate.utils.modeling import convert_file_size_to_int
from transformers import PreTrainedConfig, PreTrainedModel

from qrefta._compat import enable_checkpointing
from qrefta.config import QReftaConfig
from qrefta.memory.footprint import CHECKPOINTING, count_step, fake
from qrefta.memory.meta_model import Outline
from qrefta.methods import METHODS
from qrefta.model.stacks import select_stacks

OPTIMIZERS = {
    # as on CUDA, where it updates all parameters at once, with one more copy of them on the way
    "adamw": partial(torch.optim.AdamW, foreach=True),
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_BATCH = 1 << 20


class Saving(NamedTuple):
    """A change of the settings, and the bytes of the total that it would save."""

    change: str
    saved_bytes: int


@dataclass(frozen=True)
class Plan:
    """Memory of a training step at its peak; `total_bytes` is the sum of the first six.

    Attributes:
        linears_bytes: linears of the blocks: packed weights and scales.
        rest_bytes: what stays as it is: embeddings, norms, biases, heads, buffers.
        factors_bytes: of all stacks, trained numbers as float32 masters.
        optimizer_bytes: the optimizer's state.
        activations_bytes: what the forward pass keeps for the backward pass, inputs included.
        temporary_bytes: what comes on top at the peak: gradients, dequantized weights, logits in float32 and the like.
        gradients_bytes: of all that trains, when the backward pass is over.
        available_bytes: the GPU's, less the reserve; None without a GPU.
        largest_batch, largest_rank: that fit, all else as it is; 0 if not even 1 does. None without a GPU, the rank
            also where it is not one number.
        savings: changes that would take less, the most first; empty if it fits.
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


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | Path,
    *,
    batch: int = 1,
    seq: int | None = None,
    gpu: int | str | None = None,
    reserve: int | str = "1GB",
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    bits: int = 4,
    rank: int = 16,
    method: str = "refta",
    ranks: Sequence[int] | None = None,
    trained_params: int | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    target_modules: str | list[str] | None = None,
    modules_to_save: str | list[str] | None = None,
    factor_dtype: str = "bfloat16",
) -> Plan:
    """Memory of a training step of the model that `prepare` would make, and what fits on a GPU.

    Counted is what torch's allocator holds in a step after the first, without padding masks and without gradient
    accumulation (which adds `gradients_bytes` at most). Not counted is what lies outside: CUDA's context and libraries
    (about half a GB), their workspaces, and what the allocator loses to fragments. `reserve` is for that.

    Args:
        model: hub name or folder of a dense model, of which only config.json is read; its config; or the model, whose
            weights may be on the meta device.
        batch: sequences, or images, of one pass.
        seq: tokens of a sequence, in an encoder-decoder on both sides. None for images, whose size the config says.
        gpu: its memory, in bytes or as text: "24GB" (10^9 bytes), "24GiB".
        reserve: what of it is left to all that is not counted.
        dtype: bfloat16, float16 or float32, of what stays dense and of computing; None: the model's own.
        gradient_checkpointing: recompute the blocks' activations in the backward pass and do not keep them.
        optimizer: adamw or adamw_8bit.
        bits, rank, method, ranks, trained_params, quant_type, block_size, double_quant, target_modules,
            modules_to_save, factor_dtype: as in `qrefta.prepare`; rank="auto" needs weights and is refused.

    Raises:
        ValueError: for a setting that is not allowed, or a model that takes neither text nor images, is quantized
            already, or cannot be counted since its code depends on values.
    """
    if rank == "auto":
        raise ValueError(
            'rank is "auto", which depends on the weights; plan reads none: give a number'
        )
    available = None if gpu is None else _bytes("gpu", gpu) - _bytes("reserve", reserve)
    if available is not None and available <= 0:
        raise ValueError(
            f"gpu is {gpu!r} and reserve {reserve!r}: nothing is left; give a smaller reserve"
        )
    saved = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save or [])
    settings = {
        "bits": bits, "rank": rank, "method": method, "ranks": ranks, "trained_params": trained_params,
        "quant_type": quant_type, "block_size": block_size, "double_quant": double_quant,
        "target_modules": target_modules, "modules_to_save": saved, "factor_dtype": factor_dtype,
    }  # fmt: skip
    outline = Outline.of(model, saved)
    dtype = dtype or str(outline.model.dtype).removeprefix("torch.")
    case = _Case(batch, seq, dtype, gradient_checkpointing, optimizer, settings)
    found = _plan(outline, case)
    if available is None:
        return found
    found = replace(
        found,
        available_bytes=available,
        largest_batch=_largest_batch(outline, case, found, available),
        largest_rank=_largest_rank(outline, case, found, available),
    )
    return (
        found if found.fits else replace(found, savings=_savings(outline, case, found.total_bytes))
    )


@dataclass(frozen=True)
class _Case:
    """Arguments of `plan`: those of the step, and the settings that go to `QReftaConfig`."""

    batch: int
    seq: int | None
    dtype: str
    gradient_checkpointing: bool
    optimizer: str
    settings: Mapping[str, Any]

    def having(self, **settings: Any) -> "_Case":
        """The case with other settings."""
        return replace(self, settings={**self.settings, **settings})


def _plan(outline: Outline, case: _Case) -> Plan:
    """The plan of one case, without a GPU."""
    for name, allowed in (("dtype", DTYPES), ("optimizer", OPTIMIZERS)):
        if getattr(case, name) not in allowed:
            raise ValueError(
                f"{name} is {getattr(case, name)!r}; it must be one of {', '.join(allowed)}"
            )
    dtype = DTYPES[case.dtype]
    inputs = outline.inputs(case.batch, case.seq, dtype)
    model, sizes = outline.prepared(QReftaConfig(**case.settings), dtype)
    if case.gradient_checkpointing:
        enable_checkpointing(model, CHECKPOINTING)
    fake(model.train())
    try:
        step = count_step(model, inputs, OPTIMIZERS[case.optimizer], outline.blocks)
    except (RuntimeError, TypeError, AttributeError) as error:  # of the model's own code
        what = f"{type(model).__name__} cannot be counted on zeros for {', '.join(inputs)}"
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
    return Plan(
        linears_bytes=sizes.linears,
        rest_bytes=sizes.rest,
        factors_bytes=sizes.factors,
        optimizer_bytes=step.optimizer,
        activations_bytes=step.kept,
        temporary_bytes=step.peak - step.kept - step.optimizer,
        gradients_bytes=sum(
            parameter.nbytes for parameter in model.parameters() if parameter.requires_grad
        ),
    )


def _largest_batch(outline: Outline, case: _Case, found: Plan, available: int) -> int:
    def total(batch: int) -> int:
        return _plan(outline, replace(case, batch=batch)).total_bytes

    without = found.total_bytes - found.activations_bytes - found.temporary_bytes
    return _largest(total, available, without, (case.batch, found.total_bytes), _MOST_BATCH)


def _largest_rank(outline: Outline, case: _Case, found: Plan, available: int) -> int | None:
    def total(rank: int) -> int:
        return _plan(outline, case.having(rank=rank)).total_bytes

    settings = case.settings
    if settings["ranks"] is not None or settings["trained_params"] is not None:
        return None
    method, targets = (
        METHODS[settings["method"]],
        select_stacks(outline.stacks, settings["target_modules"]),
    )
    most = min(method.largest_rank(*stack.shape) for stack in targets)
    without = found.total_bytes - found.factors_bytes - found.optimizer_bytes
    return _largest(total, available, without, (settings["rank"], found.total_bytes), most)


def _largest(
    total: Callable[[int], int], available: int, without: int, asked: tuple[int, int], most: int
) -> int:
    """The largest number whose total is available, or 0.

    Args:
        total: bytes by number; they grow with it, about linearly, and the line through the last two says what to try.
        available: bytes.
        without: about the total of 0.
        asked: a number and its total.
        most: larger numbers are not tried.
    """
    before, last = (0, without), asked
    fits, too_large = (last[0], most + 1) if last[1] <= available else (0, last[0])
    while too_large - fits > 1:
        slope = (last[1] - before[1]) / (last[0] - before[0])
        guess = last[0] + math.floor((available - last[1]) / slope) if slope > 0 else most
        tried = min(max(guess, fits + 1), too_large - 1)
        before, last = last, (tried, total(tried))
        fits, too_large = (tried, too_large) if last[1] <= available else (fits, tried)
    return fits


def _savings(outline: Outline, case: _Case, total: int) -> tuple[Saving, ...]:
    """Single changes that lower the total, the most first."""
    settings, changes = case.settings, {}
    if not case.gradient_checkpointing and outline.model.supports_gradient_checkpointing:
        changes["gradient checkpointing"] = replace(case, gradient_checkpointing=True)
    if case.batch > 1:
        changes[f"batch {case.batch // 2}"] = replace(case, batch=case.batch // 2)
    if case.seq is not None and case.seq > 1:
        changes[f"seq {case.seq // 2}"] = replace(case, seq=case.seq // 2)
    if settings["ranks"] is None and settings["trained_params"] is None and settings["rank"] > 1:
        changes[f"rank {settings['rank'] // 2}"] = case.having(rank=settings["rank"] // 2)
    if case.optimizer == "adamw":
        changes["optimizer adamw_8bit"] = replace(case, optimizer="adamw_8bit")
    if settings["bits"] == 16:
        changes["bits 4"] = case.having(bits=4)
    elif not settings["double_quant"]:
        changes["double_quant"] = case.having(double_quant=True)
    if case.dtype == "float32":
        changes["dtype bfloat16"] = replace(case, dtype="bfloat16")
    savings = [
        Saving(change, total - _plan(outline, changed).total_bytes)
        for change, changed in changes.items()
    ]
    return tuple(
        sorted(
            (saving for saving in savings if saving.saved_bytes > 0), key=lambda saving: -saving[1]
        )
    )


def _bytes(name: str, size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{name} is {size!r}; give bytes or text like "24GB"') from error
