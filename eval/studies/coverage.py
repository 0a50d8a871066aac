"""Share of a model's weights in 4 bits: qrefta compared with bitsandbytes through transformers.

Counted from the configs of published models: both tools replace modules on the meta device as they
do when they load a checkpoint. bitsandbytes replaces linear layers. It keeps the experts of a
mixture, which transformers stores in fused parameters, in 16 bits.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import bitsandbytes
import torch
import typer
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from eval.rows import append
from qrefta.cli import guarded
from qrefta.model.stacks import find_stacks
from qrefta.nn.quantized import QuantFormat

PUBLISHED = {  # from their config.json
    "Llama-2-7B": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
    ),
    "Mixtral-8x7B": MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=768,
    ),
}
console = Console()


def run(
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Count every model."""
    for name, config in PUBLISHED.items():
        for tool, row in coverage(config).items():
            console.print(
                f"{name}, {tool}: {row['share']:.1%} of {row['weights'] / 1e9:.2f} billion "
                f"weights in 4 bits, "
                f"{row['bytes'] / 1e9:.1f} GB"
            )
            if rows is not None:
                append(rows, [{"study": "coverage", "model": name, "tool": tool} | row], seed=0)


def coverage(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """By tool: `weights` of the model, `quantized` weights, their `share`, and `bytes`.

    Both tools store NF4 in blocks of 64 with float32 scales; other weights have 16 bits.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    weights = sum(parameter.numel() for parameter in model.parameters())
    sizes = {
        "qrefta": [
            stack.out_features * stack.in_features
            for stack in find_stacks(model)
            for _ in range(stack.layers)
        ],
        "bitsandbytes": [layer.in_features * layer.out_features for layer in _bitsandbytes(model)],
    }
    found = {}
    for tool, numbers in sizes.items():
        packed = sum(sum(QuantFormat().packed_sizes(count).values()) for count in numbers)
        quantized = sum(numbers)
        found[tool] = {
            "weights": weights,
            "quantized": quantized,
            "share": quantized / weights,
            "bytes": packed + 2 * (weights - quantized),
        }
    return found


def _bitsandbytes(model: nn.Module) -> list[nn.Module]:
    """The layers that bitsandbytes puts into the model; the model is changed."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    return [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
