"""Time and memory of a training step: qrefta, its peers and the floor, all in one run.

The floor is the frozen 4-bit model: forward, and backward to its inputs, through qrefta's layers
without factors and through bitsandbytes' layers. The peers are PEFT's QLoRA (r = 16, 8, and the r
with as many parameters as R = 64; also with dropout, as in its paper), PEFT's LoRA and VeRA on
unquantized weights, and a form that rebuilds the principal part as a dense matrix in every step.
qrefta runs with its default method (windows), ReFTA, CRAFT and TeRA.

All methods adapt every linear layer of the blocks and store NF4 with double quantization. All but
the floors take an AdamW step. Weights and factors are random. On a GPU the model is in bf16 and
runs under autocast, as with `TrainingArguments(bf16=True)`. Time is the median over alternated
repetitions; peak memory is counted by torch's allocator.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eval.memory import living, tensor_peak
from eval.peers.baselines import adapted_layers, lora, quantized_layer, vera
from eval.rows import append
from qrefta._compat.transformers import enable_checkpointing
from qrefta.cli import guarded
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK
from qrefta.methods import METHODS
from qrefta.model.build import adapt, attach_bank, bank_key, freeze
from qrefta.model.replace import replace_module
from qrefta.model.stacks import find_stacks
from qrefta.nn.factors import Factors, factor_dtype
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.packed import plain_bytes
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import QuantFormat

# The references of all ratios.
REFERENCES = {"floor": "floor", "bitsandbytes": "floor bitsandbytes", "qlora": "qlora r=16"}
SMALL = 2  # components a layer of the smallest update
FORMAT = QuantFormat("nf4", double_quant=True)  # stored as QLoRA's
SPREAD = 0.02  # standard deviation of random weights, as transformers draws them
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
    "cpu wide": Setting(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 4096,
        },
        (1, 256),
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
    "70b": Setting(
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        (1, 1024),
    ),
}
# The step of the blocks alone: next to them a head of 256 words costs nothing.
SETTINGS["8b blocks"] = Setting(SETTINGS["8b"].config | {"vocab_size": 256}, SETTINGS["8b"].batch)


class Run(NamedTuple):
    """The settings that all methods share.

    Attributes:
        setting: a name in `SETTINGS`.
        device: cpu or cuda.
        dtype: of dense parameters and of computation.
        checkpointing: gradient checkpointing.
        layers: of the model; 0: as many as the setting has.
    """

    setting: str
    device: str
    dtype: torch.dtype
    checkpointing: bool
    layers: int = 0

    @property
    def config(self) -> dict[str, int]:
        """The shape of the model, by the names of `LlamaConfig`."""
        shape = SETTINGS[self.setting].config
        return shape | {"num_hidden_layers": self.layers or shape["num_hidden_layers"]}

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences and length."""
        return SETTINGS[self.setting].batch


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
        if any(text in name for text in only.split(",")) or name in REFERENCES.values()
    ]
    found = measure(names, settings, repetitions, memory=memory, time=time)
    for row in found:
        console.print(
            {
                key: round(row[key], 3)
                for key in row
                if key.endswith(("_s", "_bytes", "floor", "qlora"))
            },
            row["method"],
        )
    if rows is not None:
        append(rows, [{"study": "cost"} | row for row in found], seed=0)


def measure(
    names: list[str],
    settings: Run,
    repetitions: int,
    *,
    memory: bool = True,
    time: bool = True,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for every method, with ratios to the references that are among them.

    Args:
        names: of the methods, see `method_names`.
        settings: of all methods.
        repetitions: alternated steps per method, after a first one.
        memory: measure the peak of the second step. The first creates the optimizer state.
        time: measure time; this holds the models of all methods in memory.
        until: no further repetition begins after this time of `monotonic`, once there is one.
    """
    counts = {}
    peaks = {}
    steps = {}
    for name in names:
        before = living(settings.device)
        model = build(name, settings)
        counts[name] = sum(part.numel() for part in model.parameters() if part.requires_grad)
        step = stepper(model, settings)
        step()
        if memory:
            peaks[name] = tensor_peak(step, settings.device) - before
        if time:
            steps[name] = step
        del model, step
    times = _alternated(steps, settings.device == "cuda", repetitions, until) if time else {}
    medians = {name: median(values) for name, values in times.items()}
    found = []
    for name in names:
        row = {
            "kind": "step",
            "setting": settings.setting,
            "layers": settings.config["num_hidden_layers"],
            "method": name,
            "checkpointing": settings.checkpointing,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "batch": list(settings.batch),
            "trained_parameters": counts[name],
        }
        if time:
            row |= {
                "n": len(times[name]),
                "step_s": medians[name],
                "step_range": [min(times[name]), max(times[name])],
            }
            row |= _ratios("", medians, name)
        if memory:
            row |= {"peak_bytes": peaks[name]} | _ratios("peak_", peaks, name)
        found.append(row)
    return found


def _alternated(
    steps: dict[str, Callable[[], None]], cuda: bool, repetitions: int, until: float
) -> dict[str, list[float]]:
    """Seconds of the steps of every method, without the first one.

    Each repetition has another order, because a large step slows the one after it.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        if repetition > 1 and monotonic() > until:
            break
        for name in random.Random(repetition).sample(list(steps), len(steps)):
            seconds = timed(steps[name], cuda)
            times[name] += [seconds] if repetition else []
    return times


def _ratios(prefix: str, values: dict[str, float], name: str) -> dict[str, float]:
    return {
        f"{prefix}of_{short}": values[name] / values[reference]
        for short, reference in REFERENCES.items()
        if reference in values
    }


def method_names(setting: str, ranks: str) -> list[str]:
    """All methods, the floor first.

    QLoRA with r = 64 / layers is as large as R = 64, and with r = 2 as the smaller R of windows.
    """
    layers = SETTINGS[setting].config["num_hidden_layers"]
    matched = max(1, round(64 / layers))
    lora = [f"qlora r={r}" for r in dict.fromkeys([16, 8, matched, SMALL])]
    windows = [f"windows R={rank}" for rank in dict.fromkeys([SMALL * layers, 64])]
    ours = [*windows, *(f"refta R={rank}" for rank in ranks.split(","))]
    peers = ["qlora r=16 dropout=0.05", "lora r=16", "vera r=256", "rebuilding R=64"]
    return ["floor", "floor bitsandbytes", *lora, *peers, *ours, "craft R=64", "tera R=64"]


def build(name: str, settings: Run) -> nn.Module:
    """The model of a method with random weights, ready to train.

    It is made without storage and filled one weight at a time, so that no dense copy of a model in
    4 bits exists.
    """
    kind, *options = name.split()
    chosen = dict(option.split("=") for option in options if "=" in option)
    generator = torch.Generator(settings.device).manual_seed(0)
    model = outline(settings)
    targets = adapted_layers(model)
    if settings.checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
    if kind == "qlora" or options == ["bitsandbytes"]:
        for path in targets:
            layer = model.get_submodule(path)
            fill(layer, settings, generator)
            replace_module(model, path, quantized_layer(path, layer, double_quant=True))
    elif kind not in ("lora", "vera"):
        _adapt(model, kind, int(chosen.get("R", 0)), settings, generator)
    fill(model, settings, generator)
    if kind in ("qlora", "lora"):
        rank = int(chosen["r"])
        dropout = float(chosen.get("dropout", 0))
        model = lora(model, rank, alpha=rank, dropout=dropout, targets=targets)
    elif kind == "vera":
        model = vera(model, int(chosen["r"]))
    elif kind == "rebuilding":
        for path, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                replace_module(model, path, Rebuilding(module))
    return model.train()


def outline(settings: Run) -> LlamaForCausalLM:
    """The dense model on the meta device, frozen."""
    with torch.device("meta"), default_dtype(settings.dtype):
        model = LlamaForCausalLM(LlamaConfig(**settings.config))
    return model.requires_grad_(False)


def fill(module: nn.Module, settings: Run, generator: torch.Generator) -> None:
    """Give the parameters of a module that are on the meta device random values."""
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            if parameter.is_meta:
                value = random_weight(parameter.shape, settings, generator)
                if parameter.dim() == 1:
                    value.fill_(1)  # of a norm
                setattr(inner, name, nn.Parameter(value, parameter.requires_grad))
    if isinstance(module, LlamaForCausalLM):
        with torch.device(settings.device):  # its buffers are computed, and not stored
            module.model.rotary_emb = type(module.model.rotary_emb)(module.config)


def random_weight(shape: Sequence[int], settings: Run, generator: torch.Generator) -> Tensor:
    """Normal values on the device of a run, in its dtype."""
    empty = torch.empty(*shape, dtype=settings.dtype, device=settings.device)
    return empty.normal_(std=SPREAD, generator=generator)


def _adapt(
    model: LlamaForCausalLM, kind: str, rank: int, settings: Run, generator: torch.Generator
) -> None:
    """Replace the linear layers of the blocks by adapted ones with random weights and factors.

    Args:
        model: on the meta device.
        kind: a method; "floor" has no factors, and "rebuilding" is ReFTA with dense weights.
        rank: R.
        settings: of the run.
        generator: of random numbers.
    """
    attach_bank(model)
    for number, stack in enumerate(find_stacks(model)):
        key = None if kind == "floor" else bank_key(number)
        if key is not None:
            method = METHODS["refta" if kind == "rebuilding" else kind]
            with torch.device(settings.device):
                factors = method(*stack.shape, rank, factor_dtype(Settings()))
            getattr(model, BANK)[key] = _filled(factors, generator)
        for index in range(stack.layers):
            dense = random_weight(stack.shape[1:], settings, generator)
            adapt(model, stack, index, FORMAT, key).store(quantize(dense, FORMAT), None)
    freeze(model, ())


@torch.no_grad()
def _filled(factors: Factors, generator: torch.Generator) -> Factors:
    """Factors with random values; bytes are float32 numbers."""
    for parameter in factors.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=SPREAD, generator=generator)
        else:
            numbers = plain_bytes(parameter).view(torch.float32)
            numbers.normal_(std=SPREAD, generator=generator)
    return factors


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create float tensors in this dtype."""
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
    config = settings.config
    rows, length = settings.batch
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

    half = settings.dtype != torch.float32
    autocast = torch.autocast(settings.device, settings.dtype, enabled=half)

    def step() -> None:
        with autocast:
            loss = model(inputs_embeds=inputs, labels=labels, use_cache=False).loss
        loss.backward()
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
