"""python -m eval.quant_error: how much quantization error the split removes, by stack, transform, format and rank.

For every stack of a model, ||W_res - Q(W_res)||_F^2 against the Gaussian-zero baseline ||W - Q(W)||_F^2 (a LoRA start:
the whole weight is quantized), and for every format the relative root error on Gaussian weights.
"""

from itertools import product
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModel

from eval.demo import model_folder
from eval.rows import append
from qrefta.config import QReftaConfig
from qrefta.quantize import QUANT_TYPES, QuantFormat, dequantize, quantize
from qrefta.report import StackSplit
from qrefta.stack import LayerStack, Weights, find_stacks, model_weights
from qrefta.tensor import TRANSFORMS

SEEDS = 20  # Gaussian matrices a format
console = Console()


def run(
    model: Annotated[str | None, typer.Option(help="Hub name or folder; default: the embedded MiniLM.")] = None,
    ranks: Annotated[str, typer.Option(help="Values of R, with commas.")] = "5,15,48,96,192",
    transforms: Annotated[str, typer.Option(help="Mode-3 transforms, with commas.")] = ",".join(TRANSFORMS),
    types: Annotated[str, typer.Option(help="4-bit formats, with commas.")] = "nf4",
    rounds: Annotated[str, typer.Option(help="Rounds of refinement, with commas.")] = "0,5,8",
    rows: Annotated[Path | None, typer.Option(help="File to add the measurements to, as JSON lines.")] = None,
) -> None:
    """Measure the quantization error of every stack of a model, and of Gaussian weights."""
    found = [gaussian_row(QuantFormat(name)) for name in QUANT_TYPES]
    for row in found:
        console.print(f"{row['quant_type']}: {row['relative_root_error']:.4f} on Gaussian weights")
    dense = AutoModel.from_pretrained(model or model_folder(), dtype=torch.float32)
    settings = product(types.split(","), transforms.split(","), map(int, ranks.split(",")), map(int, rounds.split(",")))
    for stack, setting in track(list(product(find_stacks(dense), settings)), "Splitting"):
        found.append({"kind": "stack"} | measure(stack, model_weights(dense, stack), *setting))
    for row in found[len(QUANT_TYPES) :]:
        console.print(
            f"{row['stack']} {row['quant_type']} {row['transform']} R={row['rank']}, {row['refine']} rounds: "
            f"{row['ratio']:.3f} in {row['seconds']:.2f} s"
        )
    if rows is not None:
        append(rows, [{"study": "quant_error"} | row for row in found], seed=0)


def measure(
    stack: LayerStack, weights: Weights, quant_type: str, transform: str, rank: int, refine: int
) -> dict[str, Any]:
    """Errors of one stack under one setting, and the time of the split with its report."""
    config = QReftaConfig(transform=transform, rank=rank, quant_type=quant_type, refine=refine)
    start = perf_counter()
    split = StackSplit(stack, weights, config, rank, None)
    for _ in split.residuals():
        pass
    row = split.row()
    return {
        "stack": stack.name,
        "shape": list(weights.shape),
        "quant_type": quant_type,
        "block_size": config.block_size,
        "transform": transform,
        "rank": rank,
        "refine": refine,
        "baseline_error": row.baseline_error,
        "residual_error": row.residual_error,
        "ratio": row.ratio,
        "principal_energy": row.principal_energy,
        "seconds": perf_counter() - start,
    }


def gaussian_row(fmt: QuantFormat) -> dict[str, Any]:
    """||W - Q(W)||_F / ||W||_F of 256 x 256 Gaussian weights, mean over `SEEDS` draws."""
    errors = []
    for seed in range(SEEDS):
        weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        back = dequantize(quantize(weights, fmt), fmt, tuple(weights.shape), weights.dtype)
        errors.append(((weights - back).norm() / weights.norm()).item())
    return {
        "kind": "gaussian",
        "quant_type": fmt.quant_type,
        "block_size": fmt.block_size,
        "n": SEEDS,
        "relative_root_error": mean(errors),
        "standard_error": stdev(errors) / SEEDS**0.5,
    }


if __name__ == "__main__":
    typer.run(run)
