"""The dtype that a model is loaded in and computed in on a CPU.

An x86 processor without instructions for bfloat16 converts each value back and forth: torch 2.13
multiplies two matrices many times slower in bfloat16 than in float32 there, and in float16 too.
"""

import warnings
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig

from qrefta._compat.torch import has_bf16_instructions

HALF = (torch.bfloat16, torch.float16)


def loading_dtype(source: dict[str, Any], device: str) -> torch.dtype | Literal["auto"]:
    """The argument `dtype` of `from_pretrained`: "auto", the dtype of the files, or float32 where
    the device computes that slowly.

    Args:
        source: of `qrefta.files.sources.pretrained_source`.
        device: type of the device that computes, such as cuda.
    """
    if device != "cpu" or has_bf16_instructions():
        return "auto"
    stored = getattr(AutoConfig.from_pretrained(**source), "dtype", None)
    return torch.float32 if stored in HALF else "auto"


def warn_of_slow_dtype(model: nn.Module, device: str, bf16: bool) -> None:
    """Warn of a run that computes in a dtype which the device computes slowly.

    Args:
        model: to be trained.
        device: type of the device that computes, such as cuda.
        bf16: whether the run computes in bfloat16 under autocast.
    """
    if device != "cpu" or has_bf16_instructions():
        return
    slow = [parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF]
    if not bf16 and not slow:
        return
    name = "bfloat16" if bf16 else str(slow[0]).removeprefix("torch.")
    fix = "leave bf16 out" if bf16 and not slow else "load the model with dtype=torch.float32"
    if bf16 and slow:
        fix += " and leave bf16 out"
    warnings.warn(
        f"This run computes in {name}, for which this processor has no instructions (AVX512-BF16 "
        f"or AMX): it takes many times as long as in float32. To change it, {fix}; the command "
        "line does so by default (--dtype auto).",
        stacklevel=3,
    )
