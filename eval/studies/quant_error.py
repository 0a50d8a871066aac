"""Quantization error that the split removes, by rank, compared with other methods.

For each stack and for the whole model: the weight error ||W - Ŵ||_F^2 and the output error
E||x (W - Ŵ)^T||^2 on text, both relative to quantizing the whole weight (the start of LoRA).

- refta: one shot (as in the paper), refined, and calibrated on texts that do not measure
- pissa, loftq: layer by layer, with equally many 16-bit parameters
- qera: likewise; W is quantized whole and its error corrected under the inputs' metric
- craft, with --craft: its frozen Tucker part in at most the bytes of refta's factors
- smaller block: NF4 without factors, in blocks that take the same bits; 32- or 8-bit scales

The study also measures the nuclear norm ||W - Ŵ||_* (reported by the PiSSA paper), the tensor
singular values, and each format's error on Gaussian weights. Cells with a row are not repeated.
"""

import multiprocessing
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import groupby, pairwise, product
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from eval.peers.splits import loftq, pissa, qera, small_block, small_block_bits
from eval.rows import append, find, read
from eval.tasks.demo import docstring_sentences, model_folder
from qrefta.choices import QUANT_TYPES, TRANSFORMS
from qrefta.cli import guarded, quiet_libraries
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import Metric, output_error
from qrefta.methods import METHODS
from qrefta.methods.craft import CRAFT
from qrefta.methods.refta import ReFTA
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import Weights, model_weights
from qrefta.nn.factors import Factors, Fit
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import Moments, load_moments, shared_metric
from qrefta.split.residual import ROUNDS, one_shot, split_stack, tensor_values
from qrefta.split.texts import read_texts, rows_of_text

SEEDS = 20  # Gaussian matrices a format
SPECTRUM = 192  # tensor singular values a row
STARTS = {
    "one shot": 0,
    "refined": ROUNDS,
    "calibrated": ROUNDS,
}  # rounds of each
PAPER = "lsm3"  # the transform for calibration and the nuclear norm
SMALL_BLOCKS = {"smaller block": 32, "smaller block, 8-bit scales": 8}  # bits of a scale
LOFTQ_ROUNDS = 5
MOMENTS = ("calibration", "test")
SUMMED = (
    "baseline_error",
    "residual_error",
    "nuclear_baseline",
    "nuclear_error",
    "output_baseline",
    "output_error",
)
console = Console()


class Cell(NamedTuple):
    """The fields that identify a row.

    Only refta has a `transform`; refta and craft have a `start`. `rank` counts refta's components
    per stack; the other methods get equally many parameters or bytes.
    """

    text: str
    samples: int
    max_length: int
    model: str
    stack: str
    quant_type: str
    method: str
    start: str | None
    transform: str | None
    rank: int


def run(
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder; default: the embedded MiniLM.")
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="Values of R, separated by commas.")
    ] = "0,5,15,48,96,192",
    transforms: Annotated[
        str, typer.Option(help="Mode-3 transforms, separated by commas.")
    ] = ",".join(TRANSFORMS),
    types: Annotated[str, typer.Option(help="4-bit formats, separated by commas.")] = ",".join(
        QUANT_TYPES
    ),
    peers: Annotated[str, typer.Option(help="Formats for peers and calibration.")] = "nf4",
    craft: Annotated[bool, typer.Option(help="Measure CRAFT's split as well.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="File of text; default: docstring sentences.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Texts for calibration, and as many to measure.")
    ] = 600,
    max_length: Annotated[int, typer.Option(help="Most tokens per text.")] = 48,
    processes: Annotated[
        int, typer.Option(help="Processes; each of several has one CPU thread.")
    ] = os.cpu_count() or 1,
    again: Annotated[bool, typer.Option(help="Repeat cells that have a row.")] = False,
    rows: Annotated[Path, typer.Option(help="JSON lines file; new rows are added.")] = Path(
        "quant_error.jsonl"
    ),
) -> None:
    """Measure the quantization error of every stack of a model."""
    quiet_libraries()
    start = perf_counter()
    known = read(rows) if rows.exists() and not again else []
    name = model or "all-MiniLM-L6-v2"
    source = model or str(model_folder())
    dense = AutoModel.from_pretrained(source, dtype=torch.float32)
    stacks = find_stacks(dense)
    numbers = [int(rank) for rank in ranks.split(",")]
    check(stacks, numbers, transforms.split(","), types.split(","), peers.split(","))
    for format_row in map(gaussian_row, map(QuantFormat, types.split(","))):
        if (
            find(known, {key: format_row[key] for key in ("kind", "quant_type", "block_size")})
            is None
        ):
            append(rows, [{"study": "quant_error"} | format_row], seed=0)
    first = Cell(
        str(text or "docstring sentences"), samples, max_length, name, "", "", "", None, None, 0
    )
    every = cells_of(
        first, stacks, numbers, transforms.split(","), types.split(","), peers.split(","), craft
    )
    cells = [cell for cell in every if find(known, {"kind": "stack"} | cell._asdict()) is None]
    jobs = [list(job) for _, job in groupby(cells, lambda cell: cell.stack)]
    missing = []
    for stack, transform in product(stacks, transforms.split(",")):
        key = {"kind": "spectrum", "model": name, "stack": stack.name, "transform": transform}
        missing += [(stack.name, transform)] if find(known, key) is None else []
    with TemporaryDirectory() as folder, mapping(processes) as apply:
        spectra = apply(partial(spectrum, name, source), missing)
        if jobs:
            for file, moments in zip(
                MOMENTS, gather(dense, source, stacks, text, samples, max_length), strict=True
            ):
                moments.save(Path(folder) / file)
        for found in track(
            apply(partial(measure, source, folder), jobs), "Splitting", len(jobs), console=console
        ):
            append(rows, [{"study": "quant_error"} | row for row in found], seed=0)
        append(rows, [{"study": "quant_error"} | row for row in spectra], seed=0)
    for row in whole_model(read(rows)):
        if find(known, {key: row[key] for key in ("kind", *Cell._fields)}) is None:
            append(rows, [{"study": "quant_error"} | row], seed=0)
            console.print(
                f"{row['quant_type']} {row['method']} {row['start'] or ''} "
                f"{row['transform'] or ''} R={row['rank']}: "
                f"weights {row['ratio']:.3f}, outputs {row['output_ratio']:.3f}, "
                f"{row['bits_per_weight']:.2f} bits"
            )
    if cells:
        seconds = perf_counter() - start
        append(
            rows,
            [
                {
                    "study": "quant_error",
                    "kind": "run",
                    "cells": len(cells),
                    "processes": processes,
                    "seconds": seconds,
                }
            ],
            seed=0,
        )
        console.print(f"{len(cells)} cells in {seconds:.0f} s")
    for series in rising(read(rows)):
        console.print(f"[bold]Rises with R:[/] {series}")


@contextmanager
def mapping(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over processes with one thread each, or in this process if `processes` is 1."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


def check(
    stacks: list[LayerStack],
    ranks: list[int],
    transforms: list[str],
    types: list[str],
    peers: list[str],
) -> None:
    """Refuse unfit options before any measurement.

    Raises:
        ValueError: if a rank, transform or format is not allowed.
    """
    smallest = min(
        stacks, key=lambda stack: stack.layers * min(stack.out_features, stack.in_features)
    )
    limit = smallest.layers * min(smallest.out_features, smallest.in_features)
    if not all(0 <= rank <= limit for rank in ranks):
        raise ValueError(f"ranks are {ranks}; {smallest.name} allows 0 to {limit}")
    for given, allowed in ((transforms, TRANSFORMS), (types, QUANT_TYPES), (peers, QUANT_TYPES)):
        if not set(given) <= set(allowed):
            raise ValueError(f"{', '.join(given)}: allowed are {', '.join(allowed)}")


def gather(
    model: PreTrainedModel,
    source: str,
    stacks: list[LayerStack],
    text: Path | None,
    samples: int,
    max_length: int,
) -> tuple[Moments, Moments]:
    """Second moments of the inputs over `samples` of the even and of the odd texts."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if text is None:
        texts = docstring_sentences(train_size=2 * samples)["train"]["text"]
    else:
        texts = read_texts(text)
    halves = [
        rows_of_text(list(texts)[start::2], tokenizer, rows=samples, max_length=max_length)
        for start in (0, 1)
    ]
    first, second = (gather_moments(model, stacks, half, progress=False) for half in halves)
    return first, second


def cells_of(
    first: Cell,
    stacks: list[LayerStack],
    ranks: list[int],
    transforms: list[str],
    types: list[str],
    peers: list[str],
    craft: bool,
) -> Iterator[Cell]:
    """Every cell of the study by stack and format, the largest stacks first."""
    largest_first = sorted(
        stacks, key=lambda stack: -stack.layers * stack.in_features * stack.out_features
    )
    for stack, quant_type in product(largest_first, types):
        cell = partial(first._replace, stack=stack.name, quant_type=quant_type)
        for rank in ranks:
            for transform, start in product(
                transforms if rank else transforms[:1], STARTS if rank else ["one shot"]
            ):
                if start != "calibrated" or (transform == PAPER and quant_type in peers):
                    yield cell(method="refta", start=start, transform=transform, rank=rank)
            if rank and quant_type in peers:
                others = ["pissa", "loftq", "qera", *(SMALL_BLOCKS if quant_type == "nf4" else [])]
                yield from (cell(method=method, rank=rank) for method in others)
                starts = ("one shot", "refined") if craft else ()
                yield from (cell(method="craft", start=start, rank=rank) for start in starts)


@cache
def open_model(source: str) -> tuple[PreTrainedModel, dict[str, LayerStack]]:
    """The model of this process, and its stacks by name."""
    quiet_libraries()
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    return model, {stack.name: stack for stack in find_stacks(model)}


def measure(source: str, folder: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """The rows of one stack."""
    model, stacks = open_model(source)
    calibration, test = (load_moments(Path(folder) / file) for file in MOMENTS)
    stack = stacks[cells[0].stack]
    fits = {}
    rows = []
    for quant_type, group in groupby(cells, lambda cell: cell.quant_type):
        job = list(group)
        weights = model_weights(model, stack)
        study = StackErrors(stack, weights, QuantFormat(quant_type), calibration, test, fits)
        rows += [{"kind": "stack"} | cell._asdict() | study.row(cell) for cell in job]
    return rows


class Sums(NamedTuple):
    """Errors of a stack: ||E_l||_F^2 by layer, its sum, and the sums of ||E_l||_* and E||x
    E_l^T||^2.
    """

    layers: list[float]
    error: float
    nuclear: float
    output: float


class StackErrors:
    """The errors of every method on one stack in one format.

    Args:
        stack, weights, fmt: the stack, its weights, and the 4-bit format.
        calibration, test: second moments of the inputs.
        fits: fits of the unquantized weights, shared by all formats of the stack.
    """

    def __init__(
        self,
        stack: LayerStack,
        weights: Weights,
        fmt: QuantFormat,
        calibration: Moments,
        test: Moments,
        fits: dict[tuple[Any, ...], Fit],
    ) -> None:
        self.weights = weights
        self.fmt = fmt
        self.layers = [weights.layer(index) for index in range(weights.shape[0])]
        self.moments = [test.of(path) for path in stack.modules]
        self.metric = shared_metric(calibration, stack)
        self.whole = torch.stack([weight - rounded(weight, fmt) for weight in self.layers])
        self.baseline = self.sums(self.whole)
        self.stack = stack
        self.calibration = calibration
        self.fits = fits

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metric of every layer's inputs."""
        alone = [replace(self.stack, modules=(path,)) for path in self.stack.modules]
        return [shared_metric(self.calibration, layer) for layer in alone]

    def row(self, cell: Cell) -> dict[str, Any]:
        """Errors of a method, relative to quantizing whole weights, and its bits per weight."""
        errors, factor_bytes, refine = self.errors(cell)
        nuclear = cell.method in ("pissa", "loftq") or (
            cell.transform == PAPER and cell.quant_type == "nf4"
        )
        found = self.sums(errors, nuclear)
        baseline = self.baseline
        numel = self.whole.numel()
        bits = 4 + 32 / self.fmt.block_size + 8 * factor_bytes / numel
        if cell.method in SMALL_BLOCKS:
            bits = small_block_bits(self.small_block(cell), SMALL_BLOCKS[cell.method])
        return {
            "shape": list(self.weights.shape),
            "block_size": self.small_block(cell)
            if cell.method in SMALL_BLOCKS
            else self.fmt.block_size,
            "refine": refine,
            "baseline_error": baseline.error,
            "residual_error": found.error,
            "ratio": found.error / baseline.error,
            "layer_ratios": [
                error / whole for error, whole in zip(found.layers, baseline.layers, strict=True)
            ],
            "nuclear_baseline": baseline.nuclear,
            "nuclear_error": found.nuclear if nuclear else None,
            "nuclear_reduction": 1 - found.nuclear / baseline.nuclear if nuclear else None,
            "output_baseline": baseline.output,
            "output_error": found.output,
            "output_ratio": found.output / baseline.output,
            "bits_per_weight": bits,
        }

    def errors(self, cell: Cell) -> tuple[Tensor, int, int]:
        """W_l - Ŵ_l of all layers, (layers, out, in); bytes of 16-bit parameters; rounds."""
        layers, out_features, in_features = self.weights.shape
        pair_bytes = 2 * cell.rank * (out_features + in_features)
        if cell.rank == 0:
            return self.whole, 0, 0
        if cell.method in METHODS:
            return self.split(cell)
        if cell.method in SMALL_BLOCKS:
            block = self.small_block(cell)
            scale_bits = SMALL_BLOCKS[cell.method]
            return torch.stack([w - small_block(w, block, scale_bits) for w in self.layers]), 0, 0
        ranks = [cell.rank // layers + (index < cell.rank % layers) for index in range(layers)]
        if cell.method == "qera":
            return torch.stack(list(map(qera, self.whole, ranks, self.metrics))), pair_bytes, 0
        split = (
            partial(loftq, rounds=LOFTQ_ROUNDS, fmt=self.fmt) if cell.method == "loftq" else pissa
        )
        errors = []
        for weight, rank in zip(self.layers, ranks, strict=True):
            up, down, rest = split(weight, rank)
            errors.append(weight - rounded(rest, self.fmt) - up @ down)
        return torch.stack(errors), pair_bytes, LOFTQ_ROUNDS if cell.method == "loftq" else 0

    def split(self, cell: Cell) -> tuple[Tensor, int, int]:
        rank = cell.rank if cell.method == "refta" else self.craft_rank(cell)
        config = Settings(
            method=cell.method,
            transform=cell.transform or PAPER,
            quant_type=cell.quant_type,
            refine=STARTS[cell.start],
            scales="absmax",  # as in the papers that are compared
            rounding="nearest",
        )
        metric = self.metric if cell.start == "calibrated" else None
        key = (cell.method, cell.transform, rank, metric is None)
        if key not in self.fits:
            self.fits[key] = one_shot(self.weights, config, rank, metric)
        split = split_stack(self.weights, config, rank, metric, first=self.fits[key])
        errors = [
            weight
            - rounded(weight - split.base.delta(index), self.fmt)
            - split.factors.delta(index)
            for index, weight in enumerate(self.layers)
        ]
        return torch.stack(errors), split.factors.stored_bytes, STARTS[cell.start]

    def craft_rank(self, cell: Cell) -> int:
        """The largest rank over outputs and inputs whose factors take at most refta's bytes."""
        layers, out_features, in_features = self.weights.shape

        def stored_bytes(method: type[Factors], rank: int) -> int:
            with torch.device("meta"):
                return method(layers, out_features, in_features, rank, torch.bfloat16).stored_bytes

        allowed = stored_bytes(ReFTA, cell.rank)
        ranks = range(1, CRAFT.largest_rank(layers, out_features, in_features) + 1)
        return max(bisect_right(ranks, allowed, key=partial(stored_bytes, CRAFT)), 1)

    def small_block(self, cell: Cell) -> int:
        """The smallest block whose scales take at most the bits of refta's factors and scales."""
        layers, out_features, in_features = self.weights.shape
        factors = (
            16 * cell.rank * (out_features + in_features) / (layers * out_features * in_features)
        )
        return ceil(
            (small_block_bits(1, SMALL_BLOCKS[cell.method]) - 4)
            / (32 / self.fmt.block_size + factors)
        )

    def sums(self, errors: Tensor, nuclear: bool = True) -> Sums:
        outputs = [
            output_error(error, moment) for error, moment in zip(errors, self.moments, strict=True)
        ]
        norms = sum(map(nuclear_norm, errors)) if nuclear else 0.0
        layers = torch.linalg.vector_norm(errors, dim=2).double().square().sum(1).tolist()
        return Sums(layers, sum(layers), norms, sum(outputs))


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values, from the smaller Gram matrix in float64."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return torch.linalg.eigvalsh((tall.mT @ tall).double()).clamp(min=0).sqrt().sum().item()


def spectrum(name: str, source: str, which: tuple[str, str]) -> dict[str, Any]:
    """The largest tensor singular values of a stack under a transform."""
    (model, stacks), (stack, transform) = open_model(source), which
    weights = model_weights(model, stacks[stack])
    rank = min(SPECTRUM, weights.shape[0] * min(weights.shape[1:]))
    values = tensor_values(weights, Settings(transform=transform), rank)
    return {
        "kind": "spectrum",
        "model": name,
        "stack": stack,
        "transform": transform,
        "shape": list(weights.shape),
        "values": [float(f"{value:.6g}") for value in values.tolist()],
    }


def whole_model(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the whole model: sums over its stacks by all other fields of a cell.

    R = 0 has one row per format, the baseline.
    """
    found: dict[Cell, dict[str, dict[str, Any]]] = {}
    names: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "stack":
            cell = Cell(*(row[field] for field in Cell._fields))
            found.setdefault(cell._replace(stack="all"), {})[cell.stack] = row
            names.setdefault(cell.model, set()).add(cell.stack)
    for cell, stacks in found.items():
        if set(stacks) == names[cell.model]:
            yield {"kind": "model"} | cell._asdict() | totals(list(stacks.values()))


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of errors over rows of stacks, and their ratios."""
    nuclear = all(row["nuclear_error"] is not None for row in rows)
    total = {
        name: sum(row[name] for row in rows)
        for name in SUMMED
        if nuclear or name != "nuclear_error"
    }
    numel = [torch.Size(row["shape"]).numel() for row in rows]
    bits = sum(row["bits_per_weight"] * size for row, size in zip(rows, numel, strict=True))
    return total | {
        "ratio": total["residual_error"] / total["baseline_error"],
        "nuclear_reduction": 1 - total["nuclear_error"] / total["nuclear_baseline"]
        if nuclear
        else None,
        "output_ratio": total["output_error"] / total["output_baseline"],
        "bits_per_weight": bits / sum(numel),
    }


def rising(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Descriptions of the refta series whose weight error rises anywhere as R grows."""
    series: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if row["kind"] in ("stack", "model") and row["method"] == "refta":
            names = ("model", "stack", "quant_type", "transform", "start")
            series.setdefault(tuple(row[name] for name in names), {})[row["rank"]] = row["ratio"]
    for name, errors in series.items():
        ordered = [error for _, error in sorted(errors.items())]
        if any(later > earlier for earlier, later in pairwise(ordered)):
            yield f"{' '.join(name)}: {', '.join(f'{error:.4f}' for error in ordered)}"


def gaussian_row(fmt: QuantFormat) -> dict[str, Any]:
    """||W - Q(W)||_F / ||W||_F of 256 x 256 Gaussian weights, mean over `SEEDS` draws."""
    errors = []
    for seed in range(SEEDS):
        weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        errors.append(((weights - rounded(weights, fmt)).norm() / weights.norm()).item())
    return {
        "kind": "gaussian",
        "quant_type": fmt.quant_type,
        "block_size": fmt.block_size,
        "n": SEEDS,
        "relative_root_error": mean(errors),
        "standard_error": stdev(errors) / SEEDS**0.5,
    }


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
