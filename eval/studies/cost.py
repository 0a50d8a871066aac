"""Time and memory of a training step: qrefta, its peers and the floor, all in one run.

The floor is the frozen 4-bit model: forward, and backward to its inputs, through qrefta's layers
without factors and through bitsandbytes' layers. The peers are PEFT's QLoRA (r = 16, 8, and the r
with as many parameters as R = 64; also with dropout, as in its paper), PEFT's LoRA and VeRA on
unquantized weights, and a form that rebuilds the principal part as a dense matrix in every step.
qrefta runs with its default method (windows), ReFTA, CRAFT and TeRA.

All methods adapt every linear layer of the blocks and store NF4 with double quantization. All but
the floors take an AdamW step. Weights are random. Time is the median over alternated repetitions;
peak memory is counted by torch's allocator.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qrefta
from eval.memory import tensor_peak
from eval.peers.baselines import lora, qlora, quantize_layers, vera
from eval.rows import append
from qrefta._compat.transformers import enable_checkpointing
from qrefta.cli import guarded
from qrefta.methods import METHODS
from qrefta.model.stacks import replace_module
from qrefta.nn.linear import AdaptedLinear

ALWAYS = ("floor", "qlora r=16")  # the references of all ratios
SMALL = 2  # components a layer of the smallest update
console = Console()


class Setting(NamedTuple):
    """A model's shape, and the tokens of one step (sequences x length)."""

    config: dict[str, int]
    batch: tuple[int, int]


SETTINGS = {
    "tiny": Setting(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
        },
        (2, 16),
    ),
    "cpu": Setting(
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 4096,
        },
        (4, 256),
    ),
    "8b": Setting(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        (2, 2048),
    ),
    "70b, half its depth": Setting(
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        (1, 1024),
    ),
}


class Run(NamedTuple):
    """The settings that all methods share."""

    setting: str
    device: str
    dtype: torch.dtype
    checkpointing: bool


def run(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "cpu",
    ranks: Annotated[str, typer.Option(help="Values of R, separated by commas.")] = "16,64,128,512",
    repetitions: Annotated[
        int, typer.Option(help="Alternated steps per method, after a first one.")
    ] = 7,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    time: Annotated[
        bool, typer.Option(help="Measure time; this holds the models of all methods in memory.")
    ] = True,
    only: Annotated[
        str,
        typer.Option(
            help="Parts of method names, separated by commas; floor and QLoRA always run."
        ),
    ] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure a step of every method."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    settings = Run(
        setting, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32, checkpointing
    )
    names = [
        name
        for name in method_names(setting, ranks)
        if any(text in name for text in only.split(",")) or name in ALWAYS
    ]
    counts = {}
    peaks = {}
    for name in names:
        counts[name], peaks[name] = _alone(name, settings, memory)
    medians = _medians(names, settings, repetitions) if time else {}
    found = []
    for name in names:
        row = {
            "kind": "step",
            "setting": setting,
            "method": name,
            "checkpointing": checkpointing,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "batch": list(SETTINGS[setting].batch),
            "trained_parameters": counts[name],
        }
        if time:
            row |= {"n": repetitions, "step_s": medians[name]} | _ratios("", medians, name)
        if memory:
            row |= {"peak_bytes": peaks[name]} | _ratios("peak_", peaks, name)
        found.append(row)
        console.print(
            {
                key: round(row[key], 3)
                for key in row
                if key.endswith(("_s", "_bytes", "floor", "qlora"))
            },
            name,
        )
    if rows is not None:
        append(rows, [{"study": "cost"} | row for row in found], seed=0)


def _alone(name: str, settings: Run, memory: bool) -> tuple[int, int]:
    """Trainable parameters of a method, and peak memory of its second step.

    The first step creates the optimizer state.
    """
    model = build(name, settings)
    step = stepper(model, settings)
    step()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, tensor_peak(step, settings.device) if memory else 0


def _medians(names: list[str], settings: Run, repetitions: int) -> dict[str, float]:
    """Median seconds of a step of every method, without the first one.

    Each repetition has another order, because a large step slows the one after it.
    """
    steps = {name: stepper(build(name, settings), settings) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        for name in random.Random(repetition).sample(names, len(names)):
            seconds = timed(steps[name], settings.device == "cuda")
            times[name] += [seconds] if repetition else []
    return {name: median(values) for name, values in times.items()}


def _ratios(prefix: str, values: dict[str, float], name: str) -> dict[str, float]:
    return {
        f"{prefix}of_floor": values[name] / values["floor"],
        f"{prefix}of_qlora": values[name] / values["qlora r=16"],
    }


def method_names(setting: str, ranks: str) -> list[str]:
    """All methods, the floor first.

    QLoRA with r = 64 / layers is as large as R = 64, and with r = 2 as the smaller R of windows.
    """
    layers = SETTINGS[setting].config["num_hidden_layers"]
    matched = max(1, round(64 / layers))
    lora = [f"qlora r={r}" for r in dict.fromkeys([16, 8, matched, SMALL])]
    windows = [f"windows R={rank}" for rank in dict.fromkeys([SMALL * layers, 64])]
    ours = [*windows, *(f"qrefta R={rank}" for rank in ranks.split(","))]
    peers = ["qlora r=16 dropout=0.05", "lora r=16", "vera r=256", "rebuilding R=64"]
    return ["floor", "floor bitsandbytes", *lora, *peers, *ours, "craft R=64", "tera R=64"]


def build(name: str, settings: Run) -> nn.Module:
    """The model of a method, ready to train."""
    torch.manual_seed(0)
    with torch.device(settings.device), default_dtype(settings.dtype):
        model = LlamaForCausalLM(LlamaConfig(**SETTINGS[settings.setting].config))
    kind, *options = name.split()
    if settings.checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
    if kind in ("qlora", "lora"):
        chosen = dict(option.split("=") for option in options)
        rank = int(chosen["r"])
        dropout = float(chosen.get("dropout", 0))
        model.requires_grad_(False)
        if kind == "lora":
            return lora(model, rank, alpha=rank, dropout=dropout).train()
        return qlora(model, rank, alpha=rank, dropout=dropout, double_quant=True).train()
    if options == ["bitsandbytes"]:
        quantize_layers(model, double_quant=True)
        return model.requires_grad_(False).train()
    if kind == "vera":
        return vera(model.requires_grad_(False), int(options[0].removeprefix("r="))).train()
    rank = int(options[0].removeprefix("R=")) if options else 1
    method = kind if kind in METHODS else "refta"
    qrefta.prepare(
        model, method=method, rank=rank, refine=0, double_quant=True, progress=False
    )  # stored as QLoRA's
    if kind == "floor":
        model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            if kind == "floor":
                module._adapter = None
            elif kind == "rebuilding":
                replace_module(model, path, Rebuilding(module))
    return model.train()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create float tensors in this dtype, so that no larger copy of a model exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Rebuilding(nn.Module):
    """A linear layer that builds its dense weight dequant(Q) + A diag(u) B in every step."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        factors = self.layer.factors
        index = self.layer._adapter[2]
        up, down = (
            factor.to(factors.dtype).to(x.dtype) for factor in (factors.up(), factors.down())
        )
        weight = self.layer.residual(x.dtype) + (up * factors.core(index).to(x.dtype)) @ down
        return nn.functional.linear(x, weight)


def stepper(model: nn.Module, settings: Run) -> Callable[[], None]:
    """One training step on fixed random embeddings, with gradients of the embeddings."""
    config, (rows, length) = SETTINGS[settings.setting].config, SETTINGS[settings.setting].batch
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, length, config["hidden_size"], generator=generator).to(
        settings.device, settings.dtype
    )
    labels = torch.randint(config["vocab_size"], (rows, length), generator=generator).to(
        settings.device
    )
    inputs.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def step() -> None:
        model(inputs_embeds=inputs, labels=labels, use_cache=False).loss.backward()
        inputs.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def timed(step: Callable[[], object], cuda: bool) -> float:
    """Seconds of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
