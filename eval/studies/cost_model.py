"""Measured times of an adapted linear layer, compared with its counted cost.

Forward and backward passes of single layers over a grid of tokens, widths and ranks. The model is

    time = operations / speed + moved bytes / bandwidth + constant per step

with the counts of `qrefta.nn.cost.step_cost`. The three constants are fitted to all measurements
by relative least squares. Each cell has one row with measured and predicted time. It also has the
times of both forms of adding the update, which shows whether qrefta chooses the faster form, and of
rebuilding the dense weight under autograd.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from scipy.optimize import nnls

from eval.rows import append
from eval.studies.cost import timed
from qrefta.cli import guarded
from qrefta.nn import cost, product
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import QuantFormat

FORMS: dict[str, Callable[..., bool]] = {
    "counted": product.merging_is_cheaper,
    "thin": lambda *_, **__: False,
    "merged": lambda *_, **__: True,
}
WIDTHS = "256x256,512x512,1024x1024,1024x2816,2816x1024"
console = Console()


def run(
    widths: Annotated[str, typer.Option(help="in x out, separated by commas.")] = WIDTHS,
    tokens: Annotated[
        str, typer.Option(help="Tokens, separated by commas.")
    ] = "256,512,1024,2048,4096",
    ranks: Annotated[
        str, typer.Option(help="Values of R, separated by commas; 0 is the frozen layer.")
    ] = "0,16,64,256",
    repetitions: Annotated[
        int, typer.Option(help="Alternated steps per form, after a first one.")
    ] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure every cell, fit the constants and compare."""
    torch.set_num_threads(threads)
    found = []
    for width in widths.split(","):
        in_features, out_features = map(int, width.split("x"))
        for count in map(int, tokens.split(",")):
            for rank in map(int, ranks.split(",")):
                times = measure(count, in_features, out_features, rank, repetitions)
                cell = {
                    "tokens": count,
                    "in_features": in_features,
                    "out_features": out_features,
                    "rank": rank,
                }
                found.append(cell | {f"{form}_s": seconds for form, seconds in times.items()})
                console.print(found[-1])
    predicted, constants = fit(found)
    for row, seconds in zip(found, predicted, strict=True):
        row["predicted_s"] = seconds
    ratios = [row["predicted_s"] / row["counted_s"] for row in found]
    off = [max(ratio, 1 / ratio) - 1 for ratio in ratios]
    adapted = [row for row in found if row["rank"]]
    best = [row["counted_s"] / min(row["thin_s"], row["merged_s"]) - 1 for row in adapted]
    rebuilt = [row["rebuilding_s"] / row["counted_s"] for row in adapted]
    summary = {
        "kind": "fit",
        "n": len(found),
        "operations_per_s": constants[0],
        "bytes_per_s": constants[1],
        "constant_s": constants[2],
        "median_off": median(off),
        "worst_off": max(off),
        "median_above_best_form": median(best) if best else None,
        "worst_above_best_form": max(best, default=None),
        "median_rebuilding": median(rebuilt) if rebuilt else None,
        "least_rebuilding": min(rebuilt, default=None),
    }
    console.print(summary)
    if rows is not None:
        append(
            rows,
            [
                {"study": "cost_model"} | row
                for row in [*({"kind": "cell"} | r for r in found), summary]
            ],
            seed=0,
        )


def measure(
    tokens: int, in_features: int, out_features: int, rank: int, repetitions: int
) -> dict[str, float]:
    """Seconds of a forward and backward pass, by form; a frozen layer has one form."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    fmt = QuantFormat()
    shape = (out_features, in_features)
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    packed = quantize(randn(*shape), fmt)
    x = randn(tokens, in_features).to(dtype).requires_grad_()
    grad = randn(tokens, out_features).to(dtype)
    factors: list[torch.Tensor | None] = [None, None, None]
    if rank:
        factors = [
            randn(out_features, rank).requires_grad_(),
            randn(rank),
            randn(rank, in_features).requires_grad_(),
        ]

    def step() -> None:
        if rank:
            y = product.adapted_product(x, *factors, None, packed, torch.bfloat16)
        else:
            y = product.frozen_product(x, None, packed)
        backward(y)

    def rebuild() -> None:
        up, core, down = (factor.to(dtype) for factor in factors)
        weight = packed.dequantize(dtype) + (up * core) @ down
        backward(torch.nn.functional.linear(x, weight))

    def backward(y: torch.Tensor) -> None:
        torch.autograd.grad(
            y, [leaf for leaf in (x, *factors) if leaf is not None and leaf.requires_grad], grad
        )

    forms = FORMS if rank else {"counted": FORMS["counted"]}
    times: dict[str, list[float]] = {form: [] for form in (*forms, *["rebuilding"][: bool(rank)])}
    for repetition in range(repetitions + 1):
        for form in times:
            with patch.object(
                product, "merging_is_cheaper", forms.get(form, product.merging_is_cheaper)
            ):
                seconds = timed(step if form in forms else rebuild, cuda)
            times[form] += [seconds] if repetition else []
    return {form: median(values) for form, values in times.items()}


def fit(cells: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Predicted seconds of every cell, and operations per s, bytes per s and seconds per step."""
    counts = np.array([[*_cost(cell), 1.0] for cell in cells])
    measured = np.array([cell["counted_s"] for cell in cells])
    scale = counts.max(0)
    found = nnls(counts / scale / measured[:, None], np.ones(len(cells)))[0] / scale
    operations, moved, constant = (float(value) for value in found)
    speeds = [1 / share if share else float("inf") for share in (operations, moved)]
    return (counts @ found).tolist(), [*speeds, constant]


def _cost(cell: dict[str, float]) -> cost.Cost:
    sizes = (int(cell[name]) for name in ("tokens", "in_features", "out_features", "rank"))
    return cost.step_cost(*sizes, value_bytes=2 if torch.cuda.is_available() else 4)


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
