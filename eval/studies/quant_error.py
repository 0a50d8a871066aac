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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from eval.rows import append, find, read
from eval.studies.error_totals import rising, whole_model
from eval.studies.stack_errors import PAPER, SMALL_BLOCKS, STARTS, Cell, StackErrors
from eval.tasks.demo import docstring_sentences, model_folder
from qrefta.choices import QUANT_TYPES, TRANSFORMS
from qrefta.cli import guarded, quiet_libraries
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import model_weights
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import Moments, load_moments
from qrefta.split.residual import tensor_values
from qrefta.split.texts import read_texts, rows_of_text

SEEDS = 20  # Gaussian matrices a format
SPECTRUM = 192  # tensor singular values a row
MOMENTS = ("calibration", "test")
console = Console()


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
    add_gaussian_rows(rows, known, types.split(","))
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
            add(rows, found)
        add(rows, spectra)
    add_whole_model(rows, known)
    if cells:
        seconds = perf_counter() - start
        counts = {"cells": len(cells), "processes": processes, "seconds": seconds}
        add(rows, [{"kind": "run"} | counts])
        console.print(f"{len(cells)} cells in {seconds:.0f} s")
    for series in rising(read(rows)):
        console.print(f"[bold]Rises with R:[/] {series}")


def add(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows of this study to its file."""
    append(file, [{"study": "quant_error"} | row for row in rows], seed=0)


def add_gaussian_rows(file: Path, known: list[dict[str, Any]], types: list[str]) -> None:
    """Add the error of each format on Gaussian weights, unless it is known."""
    for row in map(gaussian_row, map(QuantFormat, types)):
        if find(known, {key: row[key] for key in ("kind", "quant_type", "block_size")}) is None:
            add(file, [row])


def add_whole_model(file: Path, known: list[dict[str, Any]]) -> None:
    """Add and print the sums over all stacks, unless they are known."""
    for row in whole_model(read(file)):
        if find(known, {key: row[key] for key in ("kind", *Cell._fields)}) is None:
            add(file, [row])
            console.print(
                f"{row['quant_type']} {row['method']} {row['start'] or ''} "
                f"{row['transform'] or ''} R={row['rank']}: "
                f"weights {row['ratio']:.3f}, outputs {row['output_ratio']:.3f}, "
                f"{row['bits_per_weight']:.2f} bits"
            )


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
