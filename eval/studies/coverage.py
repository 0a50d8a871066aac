"""Architectures of transformers that qrefta takes, and the share of weights in 4 bits.

A small random model of every architecture is prepared, trained for a step, saved, loaded, merged
and exported, each in a process with a time limit. An architecture with a row is skipped, so a run
that stopped goes on.

Counted from the configs of published models: both tools replace modules on the meta device as they
do when they load a checkpoint. bitsandbytes, through transformers, replaces linear layers. It keeps
the experts of a mixture, which transformers stores in fused parameters, in 16 bits.
"""

import copy
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import bitsandbytes
import peft  # noqa: F401 -- once, before the processes are forked
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

from eval.rows import append, find, read
from eval.tasks.architectures import Architecture, architectures, small_model
from eval.tasks.checks import check, summary
from qrefta.cli import guarded, quiet_libraries
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
    only: Annotated[
        list[str] | None,
        typer.Option(help="A model type, measured again if it has a row; repeat for more."),
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds for one architecture.")] = 120.0,
) -> None:
    """Count the published models, and check every architecture."""
    quiet_libraries()
    known = read(rows) if rows is not None and rows.exists() else []
    for name, config in PUBLISHED.items():
        if only or find(known, {"model": name}):
            continue
        for tool, row in coverage(config).items():
            console.print(
                f"{name}, {tool}: {row['share']:.1%} of {row['weights'] / 1e9:.2f} billion "
                f"weights in 4 bits, "
                f"{row['bytes'] / 1e9:.1f} GB"
            )
            if rows is not None:
                append(rows, [{"study": "coverage", "model": name, "tool": tool} | row], seed=0)
    for architecture in architectures():
        if architecture.name not in only if only else find(known, {"type": architecture.name}):
            continue
        row = {
            "study": "coverage",
            "type": architecture.name,
            "class": architecture.class_name,
            "head": architecture.head,
        } | checked(architecture, limit)
        console.print(f"{architecture.name}: {row['result']}", highlight=False)
        if rows is not None:
            append(rows, [row], seed=0)


def checked(architecture: Architecture, limit_s: float) -> dict[str, Any]:
    """The outcome of all checks of an architecture, in a separate process.

    `result` is works, refused, fails, or not built: no small model could be made here.
    """
    context = multiprocessing.get_context("fork")  # or each process would import for seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(architecture, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit_s) else _failed(f"no end in {limit_s:g} s")
    except EOFError:
        process.join()
        return _failed(f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _report(architecture: Architecture, sender: Connection) -> None:
    """Send the outcome of all checks of an architecture."""
    torch.set_num_threads(1)
    try:
        model = small_model(architecture)
    except Exception as error:  # transformers needs a package, or a default config makes no model
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        sender.send({"result": "not built", "error": words})
        return
    try:
        with TemporaryDirectory() as folder:
            found = check(model, Path(folder))
    except Exception as error:  # the dense model does not run on the inputs
        sender.send({"result": "not built", "error": f"{type(error).__name__}: {error}"[:300]})
        return
    sender.send({"result": summary(found["checks"])} | found)


def _failed(error: str) -> dict[str, Any]:
    return {"result": "fails", "error": error}


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
