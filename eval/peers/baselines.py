"""Peers of the studies: fine-tuning without adapters, and PEFT's methods on 16- and 4-bit weights.

`qlora` is PEFT's recipe on NF4 layers, in its variants: rank-stabilized scaling (rsLoRA), trainable
magnitudes (DoRA), and splits of the weight (QPiSSA, LoftQ, QERA).

PEFT's PiSSA does not accept quantized models, and its LoftQ needs a GPU. QPiSSA and LoftQ are
therefore built here: a split of the weight, its remainder in bitsandbytes' 4-bit layers, and the
low-rank pair as the start of PEFT's QLoRA. QERA, which PEFT does not have, starts in the same way.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import bitsandbytes as bnb
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.peers.splits import NF4, LowRank
from qrefta.model.build import task_head
from qrefta.model.replace import replace_module
from qrefta.model.stacks import find_stacks
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat

Variant = Literal["rslora", "dora"]
Split = Callable[[str, Tensor], LowRank]  # of the weight at a path


def adapted_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers that qrefta adapts by default, without fused experts."""
    return [path for stack in find_stacks(model) if not stack.experts for path in stack.modules]


def train_head_only(model: PreTrainedModel, heads: Sequence[str]) -> PreTrainedModel:
    """Freeze the model except the named modules of its base model and the task's head."""
    model.requires_grad_(False)
    for name in _heads(model, heads) or []:
        owner = model.base_model if name in heads else model
        owner.get_submodule(name).requires_grad_(True)
    return model


def lora(
    model: PreTrainedModel,
    rank: int,
    *,
    alpha: float,
    dropout: float = 0.0,
    heads: Sequence[str] = (),
    start: str = "",
    targets: list[str] | None = None,
    variant: Variant | None = None,
) -> PeftModel:
    """PEFT's LoRA on every linear layer of the blocks.

    `start` is PEFT's `init_lora_weights`; empty means the default.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or adapted_layers(model),
        init_lora_weights=start or True,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        modules_to_save=_heads(model, heads),
    )
    return get_peft_model(model, config)


def ia3(model: PreTrainedModel, *, heads: Sequence[str] = ()) -> PeftModel:
    """PEFT's IA3 on NF4 layers: a trainable scale for each output of every linear layer."""
    targets = adapted_layers(model)
    quantize_layers(model)
    config = IA3Config(
        target_modules=targets, feedforward_modules=[], modules_to_save=_heads(model, heads)
    )
    return get_peft_model(model, config)


def vera(model: PreTrainedModel, rank: int, *, heads: Sequence[str] = ()) -> PeftModel:
    """PEFT's VeRA on every linear layer of the blocks."""
    config = VeraConfig(
        r=rank, target_modules=adapted_layers(model), modules_to_save=_heads(model, heads)
    )
    return get_peft_model(model, config)


def qlora(
    model: PreTrainedModel,
    rank: int,
    *,
    alpha: float,
    dropout: float = 0.0,
    heads: Sequence[str] = (),
    double_quant: bool = False,
    split: Split | None = None,
    fmt: QuantFormat = NF4,
    variant: Variant | None = None,
) -> PeftModel:
    """PEFT's QLoRA on NF4 layers.

    Args:
        split: gives the remainder to quantize and the start of the pair.
        fmt: another format than NF4. bitsandbytes has no layers of fewer bits, so the weights are
            rounded and stay dense, which trains the same.
    """
    parts: dict[str, LowRank] = {}
    targets = adapted_layers(model)
    if split is not None:
        if alpha != rank:
            raise ValueError(f"alpha is {alpha}; a split weight needs alpha = rank = {rank}")
        for path in targets:
            weight = model.get_submodule(path).weight
            parts[path] = split(path, weight.detach())
            weight.data.copy_(parts[path].rest)
    if fmt == NF4:
        quantize_layers(model, double_quant)
    else:
        for path in targets:
            weight = model.get_submodule(path).weight
            weight.data.copy_(rounded(weight.detach(), fmt))
    adapted = lora(
        model, rank, alpha=alpha, dropout=dropout, heads=heads, targets=targets, variant=variant
    )
    for path, part in parts.items():
        layer = adapted.get_base_model().get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(part.down)
        layer.lora_B["default"].weight.data.copy_(part.up)
    return adapted


def quantize_layers(model: PreTrainedModel, double_quant: bool = False) -> None:
    """Replace the linear layers of the blocks by bitsandbytes' NF4 layers, as transformers does.

    Raises:
        ValueError: see `quantized_layer`.
    """
    for path in adapted_layers(model):
        replace_module(model, path, quantized_layer(path, model.get_submodule(path), double_quant))


def quantized_layer(path: str, old: nn.Module, double_quant: bool) -> bnb.nn.Linear4bit:
    """The NF4 layer of bitsandbytes with the weight and bias of a linear layer, on its device.

    Raises:
        ValueError: on a CPU, if a width is no multiple of 64: bitsandbytes' kernel would be wrong.
    """
    if old.weight.device.type == "cpu" and old.in_features % NF4.block_size:
        raise ValueError(
            f"{path} has width {old.in_features}; on a CPU bitsandbytes' Linear4bit needs "
            f"multiples of "
            f"{NF4.block_size}. Measure quantized peers of this model on a GPU."
        )
    new = bnb.nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=old.weight.dtype,
        quant_type="nf4",
        compress_statistics=double_quant,
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        old.weight.data,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=double_quant,
        module=new,
    )
    new.bias = old.bias
    # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks the weights in the first evaluation and
    # does not undo it, so that training after an evaluation gets wrong gradients.
    new.support_avx512bf16_for_cpu = False
    return new.to(old.weight.device)


def _heads(model: PreTrainedModel, heads: Sequence[str]) -> list[str] | None:
    """Fully trained modules: those named in the base model, and the task's head."""
    return [*heads, *task_head(model)] or None
