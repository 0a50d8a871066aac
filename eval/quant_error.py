"""python -m eval.quant_error: how much quantization error the split removes, by stack, transform, format and rank.

For every stack of a model, ||W_res - Q(W_res)||_F^2 against the Gaussian-zero baseline ||W - Q(W)||_F^2 (a LoRA start:
the whole weight is quantized), and for every format the relative root error on Gaussian weights.
"""

from itertools import product
from pathlib import Path
from statistics import mean, stdev
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
from qrefta.split import baseline_error, split_stack
from qrefta.stack import find_stacks, read_stack
from qrefta.tensor import TRANSFORMS

SEEDS = 20  # Gaussian matrices a format
console = Console()


def run(
    model: Annotated[str | None, typer.Option(help="Hub name or folder; default: the embedded MiniLM.")] = None,
    ranks: Annotated[str, typer.Option(help="Values of R, with commas.")] = "5,15,48,96,192",
    transforms: Annotated[str, typer.Option(help="Mode-3 transforms, with commas.")] = ",".join(TRANSFORMS),
    types: Annotated[str, typer.Option(help="4-bit formats, with commas.")] = "nf4",
    refine: Annotated[int, typer.Option(help="Rounds of refinement.")] = 0,
    rows: Annotated[Path | None, typer.Option(help="File to add the measurements to, as JSON lines.")] = None,
) -> None:
    """Measure the quantization error of every stack of a model, and of Gaussian weights."""
    found = [gaussian_row(QuantFormat(name)) for name in QUANT_TYPES]
    for row in found:
        console.print(f"{row['quant_type']}: {row['relative_root_error']:.4f} on Gaussian weights")
    dense = AutoModel.from_pretrained(model or model_folder(), dtype=torch.float32)
    cells = list(product(find_stacks(dense), types.split(","), transforms.split(","), map(int, ranks.split(","))))
    for stack, quant_type, transform, rank in track(cells, "Splitting"):
        config = QReftaConfig(transform=transform, rank=rank, quant_type=quant_type, refine=refine)
        found.append({"kind": "stack", "stack": stack.name} | measure(read_stack(dense, stack), config))
    for row in found[len(QUANT_TYPES) :]:
        console.print(f"{row['stack']} {row['quant_type']} {row['transform']} R={row['rank']}: {row['ratio']:.3f}")
    if rows is not None:
        append(rows, [{"study": "quant_error"} | row for row in found], seed=0)


def measure(weights: torch.Tensor, config: QReftaConfig) -> dict[str, Any]:
    """Errors of one stack (layers, out, in) under one setting."""
    baseline, residual = baseline_error(weights, config), split_stack(weights, config).error
    return {
        "shape": list(weights.shape),
        "quant_type": config.quant_type,
        "block_size": config.block_size,
        "transform": config.transform,
        "rank": config.rank,
        "refine": config.refine,
        "baseline_error": baseline,
        "residual_error": residual,
        "ratio": residual / baseline,
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
