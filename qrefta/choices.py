"""The choices that settings and options allow: torch-free, so that `qrefta --help` need not import
torch.
"""

from typing import Literal, get_args

Method = Literal["refta", "craft", "tera", "lotr", "lorta", "windows"]
Transform = Literal["lsm3", "dct", "identity"]
QuantType = Literal["nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2"]
Scales = Literal["searched", "absmax"]
RoundingName = Literal["auto", "sequential", "feedback", "nearest"]
Bits = Literal[4, 3, 2, 16, "auto"]
FactorDtype = Literal["bfloat16", "float32"]
Task = Literal["classify", "lm", "sft", "dpo", "grpo", "image"]
Loss = Literal["all", "last"]
LoraBase = Literal["residual", "residual-4bit", "original"]
GgufType = Literal["f16", "q8_0", "q4_0"]
Optimizer = Literal["adamw", "adamw_8bit"]
Dtype = Literal["bfloat16", "float16", "float32"]
LoadDtype = Literal["auto", "bfloat16", "float16", "float32"]
Selective = Literal["selective"]  # as gradient checkpointing, next to True and False

METHOD_NAMES: tuple[Method, ...] = get_args(Method)
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
SCALES: tuple[Scales, ...] = get_args(Scales)
ROUNDINGS: tuple[RoundingName, ...] = get_args(RoundingName)
BITS: tuple[Bits, ...] = get_args(Bits)
FACTOR_DTYPES: tuple[FactorDtype, ...] = get_args(FactorDtype)
TASK_NAMES: tuple[Task, ...] = get_args(Task)
LOSSES: tuple[Loss, ...] = get_args(Loss)
LORA_BASES: tuple[LoraBase, ...] = get_args(LoraBase)
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
OPTIMIZER_NAMES: tuple[Optimizer, ...] = get_args(Optimizer)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
SELECTIVE: Selective = "selective"

AUTO_RATE = "auto"  # as learning rate: the best measured one for the method
AUTO_RANK: Literal["auto"] = "auto"  # as rank: see `qrefta.split.allocate.automatic_rank`
AUTO_ROUNDING: Literal["auto"] = "auto"  # as rounding: see `qrefta.config.settings`
AUTO_BITS: Literal["auto"] = "auto"  # as bits: see `qrefta.split.formats`
GENERIC_TEXT = "text"  # as calibration: the docstrings of the standard library

BITSANDBYTES_TYPES: tuple[QuantType, ...] = ("nf4", "fp4")  # the others are ours

MIXED_TYPES: tuple[QuantType, ...] = ("nf2", "nf3", "nf4")  # of the stacks with bits="auto"

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Methods whose factors are fitted to the weights, with the mode-3 transforms that they take.
FITTED: dict[Method, tuple[Transform, ...]] = {"refta": TRANSFORMS, "craft": ("lsm3",)}


def bits_of(quant_type: QuantType) -> int:
    """Bits of a code of a format."""
    return int(quant_type[-1])
