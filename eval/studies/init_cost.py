"""Time and memory of splitting a stack, with the error and energy of the result.

On one stack of weights (24 x 1024 x 1024 by default; Gaussian, power-law or of a model), for each
R:

- exact: the t-SVD by torch.linalg.svd, slice by slice; the reference for speed
- pissa, pissa_niter_16: PEFT's start of one LoRA per layer, R / layers components each (at least 1)
- qrefta: the block method in one shot, and with rounds of refinement

Two times are medians over alternated repetitions: the decomposition, and the whole start
(transform, decomposition, refinement and quantization to NF4). Peak memory is measured in a fresh
process, above the memory it held before.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModel

from eval.memory import peak, resident, restart_peak
from eval.rows import append
from qrefta.cli import guarded
from qrefta.config.settings import Settings
from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import mix, t_svd, transform_matrix
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import Weights, model_weights
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.residual import split_layers, split_stack

console = Console()
Measured = dict[str, float]


def run(
    shape: Annotated[
        str, typer.Option(help="layers x out x in of random weights.")
    ] = "24x1024x1024",
    weights: Annotated[
        str, typer.Option(help="gaussian, or power:P for singular values i^-P.")
    ] = "gaussian",
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder of a model to take the stack from.")
    ] = None,
    stack: Annotated[str, typer.Option(help="Part of the name of the model's stack.")] = "",
    ranks: Annotated[str, typer.Option(help="Values of R, separated by commas.")] = "15,64",
    repetitions: Annotated[int, typer.Option(help="Alternated repetitions.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure time, peak memory, captured energy and error of every way to split a stack."""
    torch.set_num_threads(threads)
    make = partial(_model_stack, model, stack) if model else partial(_made_stack, shape, weights)
    tensor = make()
    whole = _error(tensor)
    found = []
    for rank in map(int, ranks.split(",")):
        results: dict[str, list[Measured]] = {name: [] for name in METHODS}
        for _ in range(repetitions):
            for name, method in METHODS.items():
                results[name].append(method(tensor, rank))
        exact_s = median(one["decompose_s"] for one in results["exact"])
        exact_energy = results["exact"][0]["energy"]
        for name, measured in results.items():
            decompose_s = median(one["decompose_s"] for one in measured)
            row = {
                "kind": "init_cost",
                "method": name,
                "weights": f"{model}: {stack}" if model else weights,
                "shape": list(tensor.shape),
                "rank": rank,
                "n": repetitions,
                "decompose_s": decompose_s,
                "total_s": median(one["total_s"] for one in measured),
                "times_faster_than_exact": exact_s / decompose_s,
                "peak_bytes": _peak(make, name, rank, threads),
                "components": measured[0]["components"],
                "energy": measured[0]["energy"],
                "energy_of_exact": measured[0]["energy"] / exact_energy,
                "error_ratio": measured[0]["error"] / whole,
            }
            found.append(row)
            console.print(
                f"R={rank} {name}: decompose {decompose_s:.3f} s "
                f"({row['times_faster_than_exact']:.1f}x exact), total "
                f"{row['total_s']:.3f} s, {row['peak_bytes'] / 1e6:.0f} MB, energy "
                f"{row['energy_of_exact']:.5f} of "
                f"exact, error {row['error_ratio']:.4f}"
            )
    if rows is not None:
        append(rows, [{"study": "init_cost"} | row for row in found], seed=0)


def exact(stack: Tensor, rank: int) -> Measured:
    """ReFTA's split by an exact SVD of each slice, in float32 as the published code does it."""
    start = perf_counter()
    slices, transform = _transformed(stack)
    decomposing = perf_counter()
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in slices]
    values = torch.cat([part.S for part in parts])
    threshold = values.topk(rank).values[-1]
    decompose_s = perf_counter() - decomposing
    principal = torch.stack([(p.U * (p.S * (threshold <= p.S))) @ p.Vh for p in parts])
    residual = stack - mix(principal, transform.T)
    error = _error(residual)
    return {
        "decompose_s": decompose_s,
        "total_s": perf_counter() - start,
        "energy": values.topk(rank).values.double().square().sum().item(),
        "components": rank,
        "error": error,
    }


def pissa(initialization: str, stack: Tensor, rank: int) -> Measured:
    """PEFT's PiSSA with its share of the components in every layer."""
    share = max(1, round(rank / len(stack)))
    layers = nn.ModuleDict()
    for index, weight in enumerate(stack):
        layers[f"layer{index}"] = nn.Linear(
            weight.shape[1], weight.shape[0], bias=False, device="meta"
        )
        layers[f"layer{index}"].weight = nn.Parameter(weight.clone())
    config = LoraConfig(
        r=share, lora_alpha=share, init_lora_weights=initialization, target_modules=list(layers)
    )
    start = perf_counter()
    adapted = get_peft_model(layers, config)
    decompose_s = perf_counter() - start
    residual = torch.stack(
        [adapted.base_model.model[name].base_layer.weight.detach() for name in layers]
    )
    error = _error(residual)
    return {
        "decompose_s": decompose_s,
        "total_s": perf_counter() - start,
        "energy": (stack - residual).double().square().sum().item(),
        "components": share * len(stack),
        "error": error,
    }


def qrefta(refine: int, stack: Tensor, rank: int) -> Measured:
    """Split by qrefta; the decomposition is timed without the rounds."""
    config = Settings(refine=refine, rank=rank, scales="absmax")
    weights = Weights.of(stack)
    slices, _ = _transformed(stack)
    blocks = [(slice(0, stack.shape[1]), slices)]
    start = perf_counter()
    found, _ = t_svd(Slices(lambda: blocks, tuple(stack.shape), stack.device), rank, config.seed)
    decompose_s = perf_counter() - start
    blocks.clear()
    del slices
    start = perf_counter()
    split = split_stack(weights, config, rank)
    error = sum(
        layer.error.double().square().sum().item() for layer in split_layers(weights, split, config)
    )
    return {
        "decompose_s": decompose_s,
        "total_s": perf_counter() - start,
        "energy": found.values.square().sum().item(),
        "components": rank,
        "error": error,
    }


METHODS: dict[str, Callable[[Tensor, int], Measured]] = {
    "exact": exact,
    "pissa": partial(pissa, "pissa"),
    "pissa_niter_16": partial(pissa, "pissa_niter_16"),
    "qrefta": partial(qrefta, 0),
    "qrefta, 5 rounds": partial(qrefta, 5),
    "qrefta, 8 rounds": partial(qrefta, 8),
}


def _transformed(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The slices under lsm3, and the transform."""
    transform = transform_matrix(
        lambda: [(slice(0, stack.shape[1]), stack)], stack.shape[0], "lsm3"
    )
    return mix(stack, transform), transform


def _error(stack: Tensor) -> float:
    """||W - Q(W)||_F^2, NF4."""
    fmt = QuantFormat("nf4")
    return sum((weight - rounded(weight, fmt)).double().square().sum().item() for weight in stack)


def _made_stack(shape: str, kind: str) -> Tensor:
    layers, out_features, in_features = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return torch.randn(layers, out_features, in_features, generator=generator)
    width = min(out_features, in_features)
    values = torch.arange(1, width + 1).float() ** -float(kind.removeprefix("power:"))

    def orthonormal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, width, generator=generator)).Q

    return torch.stack(
        [(orthonormal(out_features) * values) @ orthonormal(in_features).T for _ in range(layers)]
    )


def _model_stack(model: str, name: str) -> Tensor:
    dense = AutoModel.from_pretrained(model, dtype=torch.float32)
    stack = next(stack for stack in find_stacks(dense) if name in stack.name)
    return model_weights(dense, stack).rows(0, stack.out_features)


def _peak(make: Callable[[], Tensor], name: str, rank: int, threads: int) -> int:
    """Peak memory of a split in a fresh process, without the weights and the libraries."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (make, name, rank, threads))


def _peak_here(make: Callable[[], Tensor], name: str, rank: int, threads: int) -> int:
    torch.set_num_threads(threads)
    tensor = make()
    METHODS[name](torch.randn(2, 64, 64), 2)  # load libraries before measuring
    before = resident()
    restart_peak()
    METHODS[name](tensor, rank)
    return peak() - before


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
