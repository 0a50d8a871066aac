"""python -m eval.studies.cost: time and memory of a training step, beside the floor and every peer, in one run.

The floor is the frozen 4-bit model alone: forward, and backward to its inputs only, through our layers without factors
and through bitsandbytes' own. Beside it: PEFT's QLoRA (r = 16, 8, and the r that trains as many numbers as R = 64),
also with the dropout of its paper's recipe; PEFT's LoRA and VeRA on the unquantized weights; the tensor form that
rebuilds the principal part as a dense matrix in every step; qrefta, and its CRAFT and TeRA. All adapt every linear of
the blocks, store NF4 with double quantization and, but for the floors, take an AdamW step. Weights are random.

Time is the median over alternated repetitions. Peak memory is a step's, as torch's allocator counts it.
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
from eval.peers.baselines import lora, qlora, quantize_linears, vera
from eval.rows import append
from qrefta._compat import enable_checkpointing
from qrefta.cli import guarded
from qrefta.methods import METHODS
from qrefta.model.stacks import replace_module
from qrefta.nn.linear import AdaptedLinear

ALWAYS = ("floor", "qlora r=16")  # what the others are told relative to
console = Console()


class Setting(NamedTuple):
    """A model's shape, and the tokens of one step (sequences x length)."""

    config: dict[str, int]
    batch: tuple[int, int]


SETTINGS = {
    "tiny": Setting(
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 256}, (2, 16)),
    "cpu": Setting(
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 4096}, (4, 256)),
    "8b": Setting(
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}, (2, 2048)),
    "70b, half its depth": Setting(
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 128256}, (1, 1024)),
}  # fmt: skip


class Run(NamedTuple):
    """What every method is built from."""

    setting: str
    device: str
    dtype: torch.dtype
    checkpointing: bool


def run(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "cpu",
    ranks: Annotated[str, typer.Option(help="Values of R, with commas.")] = "16,64,128,512",
    repetitions: Annotated[
        int, typer.Option(help="Alternated steps of each method, after a first one.")
    ] = 7,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    time: Annotated[
        bool, typer.Option(help="Measure time; then all methods' models are in memory together.")
    ] = True,
    only: Annotated[
        str,
        typer.Option(
            help="Texts in the names of the methods to run, with commas; floor and QLoRA always do."
        ),
    ] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[
        Path | None, typer.Option(help="File to add the measurements to, as JSON lines.")
    ] = None,
) -> None:
    """Measure a step of every method."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    what = Run(
        setting, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32, checkpointing
    )
    names = [
        name
        for name in method_names(setting, ranks)
        if any(text in name for text in only.split(",")) or name in ALWAYS
    ]
    counts, peaks = {}, {}
    for name in names:
        counts[name], peaks[name] = _alone(name, what, memory)
    medians = _medians(names, what, repetitions) if time else {}
    found = []
    for name in names:
        row = {
            "kind": "step", "setting": setting, "method": name, "checkpointing": checkpointing,
            "dtype": str(what.dtype).removeprefix("torch."), "batch": list(SETTINGS[setting].batch),
            "trained_parameters": counts[name],
        }  # fmt: skip
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


def _alone(name: str, what: Run, memory: bool) -> tuple[int, int]:
    """How many numbers a method trains, and the most memory of its second step (the first makes optimizer state)."""
    model = build(name, what)
    step = stepper(model, what)
    step()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, tensor_peak(step, what.device) if memory else 0


def _medians(names: list[str], what: Run, repetitions: int) -> dict[str, float]:
    """Seconds of a step of every method, after a first one.

    In another order in every repetition: what a large step leaves in caches and allocator slows the one after it.
    """
    steps = {name: stepper(build(name, what), what) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        for name in random.Random(repetition).sample(names, len(names)):
            seconds = timed(steps[name], what.device == "cuda")
            times[name] += [seconds] if repetition else []
    return {name: median(values) for name, values in times.items()}


def _ratios(prefix: str, values: dict[str, float], name: str) -> dict[str, float]:
    own = values[name]
    return {
        f"{prefix}of_floor": own / values["floor"],
        f"{prefix}of_qlora": own / values["qlora r=16"],
    }


def method_names(setting: str, ranks: str) -> list[str]:
    """The floor first; QLoRA with about as many trained numbers as R = 64 has r = 64 / layers."""
    matched = max(1, round(64 / SETTINGS[setting].config["num_hidden_layers"]))
    lora = [f"qlora r={r}" for r in dict.fromkeys([16, 8, matched])]
    ours = [f"qrefta R={rank}" for rank in ranks.split(",")]
    peers = ["qlora r=16 dropout=0.05", "lora r=16", "vera r=256", "rebuilding R=64"]
    return ["floor", "floor bitsandbytes", *lora, *peers, *ours, "craft R=64", "tera R=64"]


def build(name: str, what: Run) -> nn.Module:
    """The model of a method, ready to train."""
    torch.manual_seed(0)
    with torch.device(what.device), default_dtype(what.dtype):
        model = LlamaForCausalLM(LlamaConfig(**SETTINGS[what.setting].config))
    kind, *options = name.split()
    if what.checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
    if kind in ("qlora", "lora"):
        chosen = dict(option.split("=") for option in options)
        rank, dropout = int(chosen["r"]), float(chosen.get("dropout", 0))
        model.requires_grad_(False)
        if kind == "lora":
            return lora(model, rank, alpha=rank, dropout=dropout).train()
        return qlora(model, rank, alpha=rank, dropout=dropout, double_quant=True).train()
    if options == ["bitsandbytes"]:
        quantize_linears(model, double_quant=True)
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
    """Make floating tensors in this dtype, so that no larger copy of a model ever exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Rebuilding(nn.Module):
    """A linear whose dense weight dequant(Q) + A diag(u) B is made in every step, by autograd."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        factors, index = self.layer.factors, self.layer._adapter[2]
        up, down = (
            factor.to(factors.dtype).to(x.dtype) for factor in (factors.up(), factors.down())
        )
        weight = self.layer.residual(x.dtype) + (up * factors.core(index).to(x.dtype)) @ down
        return nn.functional.linear(x, weight)


def stepper(model: nn.Module, what: Run) -> Callable[[], None]:
    """One training step on fixed random embeddings, whose gradients are taken too, for every method alike."""
    config, (rows, length) = SETTINGS[what.setting].config, SETTINGS[what.setting].batch
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, length, config["hidden_size"], generator=generator).to(
        what.device, what.dtype
    )
    labels = torch.randint(config["vocab_size"], (rows, length), generator=generator).to(
        what.device
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
