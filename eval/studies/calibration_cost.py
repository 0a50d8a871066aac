"""Time of gathering second moments, in plain forward passes over the same batches.

The batches are windows of running text (qrefta's default for a language model). Floor and gathering
alternate; each ratio compares neighbours, and medians are recorded. The error of the moments is
relative to products and sums in float64, for the linear layers of the first and last block. Last,
the model is prepared with calibration and error feedback, and the time of all of it is recorded.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qrefta
from eval.rows import append
from qrefta.cli import guarded
from qrefta.config.stack import LayerStack
from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import Moments
from qrefta.split.texts import generic_texts, read_texts, windows_of_text

console = Console()


def run(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    text: Annotated[Path | None, typer.Option(help="File of text; default: generic text.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of all windows.")] = 8192,
    repetitions: Annotated[int, typer.Option(help="Alternated repetitions.")] = 3,
    rank: Annotated[int, typer.Option(help="R of the prepared model.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; a row is added.")] = None,
) -> None:
    """Measure the seconds and processor seconds of the forward pass and of gathering."""
    torch.set_num_threads(threads)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = generic_texts() if text is None else read_texts(text)
    batches = windows_of_text(texts, tokenizer, tokens=tokens)
    stacks = find_stacks(dense)
    measured: dict[str, list[tuple[float, float]]] = {"floor": [], "gather": []}
    for _ in range(repetitions):
        measured["floor"].append(_timed(lambda: _forward(dense, batches)))
        measured["gather"].append(
            _timed(lambda: gather_moments(dense, stacks, batches, progress=False))
        )
    moments = gather_moments(dense, stacks, batches[:1], progress=False)
    row = _row(measured) | {
        "model": model,
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "batch_tokens": batches[0]["input_ids"].numel(),
        "n": repetitions,
        "relative_error": _relative_error(dense, stacks, batches[0], moments),
    }
    start = time.perf_counter()
    qrefta.prepare(
        dense, rank=rank, calibration=text or "text", tokenizer=tokenizer, progress=False
    )
    row |= {"prepare_s": time.perf_counter() - start, "prepare_rank": rank}
    console.print(row)
    if rows is not None:
        append(rows, [{"study": "calibration_cost", "kind": "calibration_cost"} | row], seed=0)


def _row(measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians of the seconds, and of the ratios of neighbours."""
    row: dict[str, Any] = {}
    for name, times in measured.items():
        row[f"{name}_s"] = median(wall for wall, _ in times)
        row[f"{name}_cpu_s"] = median(cpu for _, cpu in times)
    pairs = list(zip(measured["floor"], measured["gather"], strict=True))
    row["ratio"] = median(gather[0] / floor[0] for floor, gather in pairs)
    row["cpu_ratio"] = median(gather[1] / floor[1] for floor, gather in pairs)
    return row


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    cpu = time.process_time()
    wall = time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch, logits_to_keep=1)


def _relative_error(
    model: nn.Module, stacks: list[LayerStack], batch: dict[str, Tensor], moments: Moments
) -> float:
    """The largest ||S - S64||_F / ||S64||_F over the first and last layer of every stack."""
    paths = [stack.modules[place] for stack in stacks for place in (0, -1)]
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(_keep, inputs, path))
        for path in paths
    ]
    _forward(model, [batch])
    for handle in handles:
        handle.remove()
    errors = []
    for path, x in inputs.items():
        reference = x.T @ x / len(x)
        errors.append(((moments.of(path) - reference).norm() / reference.norm()).item())
    return max(errors)


def _keep(inputs: dict[str, Tensor], path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[path] = args[0].flatten(0, -2).double()


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
