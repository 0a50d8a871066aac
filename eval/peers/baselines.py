"""The peers that studies compare with: fine-tuning without adapters, and PEFT's methods on 16- and 4-bit weights.

PEFT's own PiSSA takes no quantized model and its LoftQ no CPU, so QPiSSA and LoftQ are put together here: the split by
PEFT or by LoftQ's published iteration, the remainder through bitsandbytes, the trained pair in PEFT's QLoRA.
"""

from collections.abc import Callable, Sequence

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.peers.splits import NF4, LowRank
from qrefta.model.build import task_head
from qrefta.model.stacks import find_stacks, replace_module


def linears(model: nn.Module) -> list[str]:
    """Paths of the linears that qrefta adapts by default; of a mixture without its experts, which are no linears."""
    return [path for stack in find_stacks(model) if not stack.experts for path in stack.modules]


def train_head_only(model: PreTrainedModel, heads: Sequence[str]) -> PreTrainedModel:
    """Freeze all but the named modules of the base model and a classifier behind it."""
    model.requires_grad_(False)
    for name in _heads(model, heads) or []:
        owner = model.base_model if name in heads else model
        owner.get_submodule(name).requires_grad_(True)
    return model


def lora(
    model: PreTrainedModel, rank: int, *, alpha: float, dropout: float = 0.0, heads: Sequence[str] = (),
    start: str = "", targets: list[str] | None = None,
) -> PeftModel:  # fmt: skip
    """PEFT's LoRA on every linear of the blocks; `start` is `init_lora_weights`, empty for LoRA's own."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets or linears(model),
        init_lora_weights=start or True, modules_to_save=_heads(model, heads),
    )  # fmt: skip
    return get_peft_model(
        model, config, autocast_adapter_dtype=False
    )  # else a bf16 step runs in float32


def vera(model: PreTrainedModel, rank: int, *, heads: Sequence[str] = ()) -> PeftModel:
    """PEFT's VeRA on every linear of the blocks."""
    config = VeraConfig(r=rank, target_modules=linears(model), modules_to_save=_heads(model, heads))
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def qlora(
    model: PreTrainedModel, rank: int, *, alpha: float, dropout: float = 0.0, heads: Sequence[str] = (),
    double_quant: bool = False, split: Callable[[Tensor, int], LowRank] | None = None,
) -> PeftModel:  # fmt: skip
    """PEFT's QLoRA on NF4 linears; `split` (`pissa`: QPiSSA, `loftq`: LoftQ) tells what to quantize and start from."""
    parts, targets = {}, linears(model)
    if split is not None:
        if alpha != rank:
            raise ValueError(f"alpha is {alpha}; a split of the weight needs alpha = rank = {rank}")
        for path in targets:
            weight = model.get_submodule(path).weight
            parts[path] = split(weight.detach(), rank)
            weight.data.copy_(parts[path].rest)
    quantize_linears(model, double_quant)
    adapted = lora(model, rank, alpha=alpha, dropout=dropout, heads=heads, targets=targets)
    for path, part in parts.items():
        layer = adapted.get_base_model().get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(part.down)
        layer.lora_B["default"].weight.data.copy_(part.up)
    return adapted


def quantize_linears(model: PreTrainedModel, double_quant: bool = False) -> None:
    """Put bitsandbytes' own linears into the blocks, as transformers makes them for QLoRA in NF4.

    Raises:
        ValueError: for widths that bitsandbytes' CPU kernel reads wrongly: rows that end within a block of 64.
    """
    for path in linears(model):
        old = model.get_submodule(path)
        if old.weight.device.type == "cpu" and old.in_features % NF4.block_size:
            raise ValueError(
                f"{path} is {old.in_features} wide; on a CPU bitsandbytes' Linear4bit is right for multiples of "
                f"{NF4.block_size} alone. Measure quantized peers of this model on a GPU."
            )
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=old.weight.dtype,
            quant_type="nf4", compress_statistics=double_quant,
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(
            old.weight.data.cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=double_quant,
            module=new,
        )
        new.bias = old.bias
        replace_module(model, path, new.to(old.weight.device))


def _heads(model: PreTrainedModel, heads: Sequence[str]) -> list[str] | None:
    """Modules that train whole: those named in the base model, and the task's head, as qrefta finds it."""
    return [*heads, *task_head(model)] or None
