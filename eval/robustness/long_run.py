"""Growth of memory and of step time over thousands of training steps with checkpoints.

A small decoder trains dense and prepared, each in a separate process. Growth in both comes from the
trainer. Resident memory and time are recorded after every step. The result is the slope of a
regression line after the first tenth of the run, with its standard error. The line is fitted to
medians of blocks of steps, because single steps are not independent.
"""

import math
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from scipy.stats import linregress
from transformers import AutoModelForCausalLM, TrainerCallback

import qrefta
from eval.memory import resident
from eval.robustness.small_model import numbers, tokenizer, write_decoder
from eval.rows import append
from qrefta.cli import guarded
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune

BLOCKS = 30
console = Console()


def run(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints, and between evaluations.")
    ] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Train and measure."""
    for model in ("dense", "prepared"):
        place = Path(tempfile.mkdtemp(prefix="qrefta-long-"))
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (place, model, steps, save_steps, threads))
        finally:
            shutil.rmtree(place)
        for name, unit in (("memory", "bytes"), ("time", "s")):
            console.print(
                f"{model}, {name}: {row[f'{name}_slope']:+.3g} ± {row[f'{name}_slope_error']:.2g} "
                f"{unit} a step, of "
                f"{row[f'{name}_median']:.4g}"
            )
        console.print(f"test loss {row['test_loss_before']:.3f} -> {row['test_loss']:.3f}")
        if rows is not None:
            append(rows, [{"study": "long_run"} | row], seed=0)


def measure(place: Path, kind: str, steps: int, save_steps: int, threads: int) -> dict[str, Any]:
    """The row of one run of the dense or the prepared model; its files are in `place`."""
    torch.set_num_threads(threads)
    write_decoder(place / "dense")
    qrefta.prepare_checkpoint(place / "dense", place / "prepared", rank=8, refine=1, progress=False)
    model = AutoModelForCausalLM.from_pretrained(place / kind, dtype=torch.float32)
    watch = _Watch(save_steps)
    args = training_arguments(
        "lm",
        place / "run",
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=save_steps,
        disable_tqdm=True,
    )
    result = finetune(
        model, tokenizer(), numbers(), task="lm", args=args, max_length=16, callbacks=[watch]
    )
    row = {
        "model": kind,
        "steps": result.steps,
        "save_steps": save_steps,
        "evaluations": watch.evaluations,
        "saves": watch.saves,
        "test_loss_before": result.test_loss_before,
        "test_loss": result.test_loss,
        "finite": all(map(math.isfinite, watch.losses)),
    }
    for name, values in (("memory", watch.memory), ("time", watch.seconds)):
        slope, error, median = trend(values)
        row |= {f"{name}_slope": slope, f"{name}_slope_error": error, f"{name}_median": median}
    return row


def trend(values: list[float]) -> tuple[float, float, float]:
    """Slope per step, its standard error, and the median, from `BLOCKS` blocks of steps."""
    start = len(values) // 10
    size = (len(values) - start) // BLOCKS
    parts = torch.tensor(values[start : start + size * BLOCKS], dtype=torch.float64).view(
        BLOCKS, size
    )
    medians = parts.median(1).values
    line = linregress(range(BLOCKS), medians)
    return line.slope / size, line.stderr / size, medians.median().item()


class _Watch(TrainerCallback):
    """Records memory and seconds of every step; the seconds exclude evaluation and saving."""

    def __init__(self, every: int) -> None:
        self.memory: list[float] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.evaluations = 0
        self.saves = 0
        self._every = every
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.memory.append(resident())
        control.should_evaluate = control.should_log = state.global_step % self._every == 0

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.evaluations += 1
        self.losses.append(metrics["eval_loss"])

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saves += 1


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
