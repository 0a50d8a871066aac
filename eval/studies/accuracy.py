"""Fine-tune with every method on the same rows, order and steps, and score.

Each method chooses its learning rate by the mean over three seeds on validation rows. All start
from the same rates. While the best is the lowest or highest tried, the next rate in that direction
is tried too; rates are 1 and 3 times powers of ten. Where answers in words are scored, the rate is
chosen by their perplexity: it costs one pass, and varies less than their accuracy. Other seeds
score on the test rows. Runs with a row in the rows file are not repeated.

Methods are named as `eval.peers.named` says.
"""

import copy
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from eval.memory import living, tensor_peak
from eval.peers.named import CORE, build, parse
from eval.rows import append, find, read
from eval.tasks.image import image_task
from eval.tasks.language import choice_task, prompt_task, text_lm_task
from eval.tasks.smollm2 import NAME as SMOLLM2
from eval.tasks.smollm2 import cache_folder, smollm2_folder
from eval.tasks.task import (
    METRICS,
    NAMED,
    RATES,
    HeaderOption,
    Named,
    Sizes,
    Task,
    best_rate,
    find_data,
    in_order,
    text_task,
)
from qrefta.cli import guarded, quiet_libraries

KINDS = {
    "text": text_task,
    "image": image_task,
    "language": text_lm_task,
    "choice": choice_task,
    "prompt": prompt_task,
}
LANGUAGE_KINDS = ("language", "choice", "prompt")
GRID = "0.0003,0.001,0.003"
SEARCH_SEEDS = (0, 1001, 1002)
console = Console()


class Cell(NamedTuple):
    """One training run: the fields that identify its row."""

    kind: str
    task: str
    model: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    train_rows: int
    validation_rows: int
    test_rows: int
    max_length: int


def run(
    task: Annotated[
        list[str], typer.Option(help=f"{', '.join(NAMED)}; or a hub name, folder or file.")
    ],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = ",".join(CORE),
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds 1 .. n of the scores: head, rows and batch order.")
    ] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Hub name or folder; default: the embedded MiniLM, for language {SMOLLM2}."
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of an unnamed task: {', '.join(KINDS)}; default: text."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of data; default: $QREFTA_DATA.")
    ] = None,
    header: HeaderOption = None,
    learning_rates: Annotated[str, typer.Option(help="Learning rates to begin with.")] = GRID,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    train_rows: Annotated[int, typer.Option(min=1, help="Most training rows.")] = 2000,
    validation_rows: Annotated[
        int, typer.Option(min=1, help="Training rows put aside to choose a learning rate.")
    ] = 500,
    test_rows: Annotated[int, typer.Option(min=1, help="Most test rows.")] = 2000,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens per row.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    again: Annotated[bool, typer.Option(help="Repeat runs that have a row.")] = False,
    rows: Annotated[Path, typer.Option(help="JSON lines file; new rows are added.")] = Path(
        "accuracy.jsonl"
    ),
) -> None:
    """Fine-tune and score every method."""
    quiet_libraries()
    torch.set_num_threads(threads)
    grid = [float(rate) for rate in learning_rates.split(",")]
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        parse(name)
    sizes = Sizes(train_rows, validation_rows, test_rows, max_length)
    sources = {name: find_data(name, data) for name in task}
    for name, source in sources.items():
        kind_of_task = kind or NAMED.get(name, Named()).kind
        label, place = _model_of(kind_of_task, model)
        load = KINDS[kind_of_task]
        study = Study(partial(load, name, source, place, header, sizes), rows, again)
        for method in names:
            fixed = {
                "task": name,
                "model": label,
                "method": method,
                "steps": steps,
                "batch_size": batch_size,
                "train_rows": train_rows,
                "validation_rows": validation_rows,
                "test_rows": test_rows,
                "max_length": max_length,
            }
            rate = study.rate(grid, fixed)
            for seed in range(1, seeds + 1):
                study.row(Cell("score", learning_rate=rate, seed=seed, **fixed))


def _model_of(kind: str, model: str | None) -> tuple[str, str | None]:
    """The name of a model in the rows, and where it is loaded from (None: the embedded MiniLM)."""
    if model is None and kind in LANGUAGE_KINDS:
        return SMOLLM2, str(smollm2_folder(cache_folder()))
    return model or "all-MiniLM-L6-v2", model


class Built(NamedTuple):
    """An untrained model of a method.

    Attributes:
        head_parameters: trainable parameters of the head, which all methods train.
        seconds: that building took.
    """

    model: nn.Module
    head_parameters: int
    seconds: float

    @classmethod
    def of(cls, method: str, task: Task, seed: int) -> "Built":
        """Build it; its random numbers depend on `seed` only."""
        head_parameters = count_trained(build("head-only", task, seed))
        start = time.perf_counter()
        model = build(method, task, seed)
        return cls(model, head_parameters, time.perf_counter() - start)


class Study:
    """A rows file and the training runs that add to it.

    A method's models of the search seeds are kept while its rates are searched: calibrating and
    preparing take as long as a short training run.
    """

    def __init__(self, load: Callable[[int], Task], rows: Path, again: bool) -> None:
        self.load = cache(load)
        self.rows = rows
        self.known = read(rows) if rows.exists() and not again else []
        self.built = lru_cache(maxsize=len(SEARCH_SEEDS))(
            lambda method, seed: Built.of(method, self.load(seed), seed)
        )

    def rate(self, grid: list[float], fixed: dict[str, Any]) -> float:
        """The best learning rate of a method; the grid grows until the best has neighbours.

        Args:
            grid: rates to begin with; with one rate nothing is searched.
            fixed: fields of the cells that stay as they are.
        """
        if len(grid) == 1:
            return grid[0]
        rates = sorted(grid)
        while True:
            best = best_rate(
                [
                    self.row(Cell("search", learning_rate=rate, seed=seed, **fixed))
                    for rate in rates
                    for seed in SEARCH_SEEDS
                ]
            )
            lower = [rate for rate in RATES if rate < rates[0]]
            higher = [rate for rate in RATES if rate > rates[-1]]
            if best == rates[0] and lower:
                rates.insert(0, lower[-1])
            elif best == rates[-1] and higher:
                rates.append(higher[0])
            else:
                return best

    def row(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell; a missing row is measured and added to the file."""
        key = cell._asdict()
        known = find(self.known, key)
        if known is not None:
            return known
        built = self.built(cell.method, cell.seed)
        row = {"study": "accuracy"} | key | measure(cell, self.load(cell.seed), built)
        append(self.rows, [row], seed=cell.seed)
        self.known.append(row)
        console.print(
            f"{cell.task}, {cell.method}, seed {cell.seed}, learning rate {cell.learning_rate:g}: "
            f"{row['split']} "
            f"{row['metric']} {row['value']:.4f}, {row['cpu_s']:.0f} s"
        )
        return row


def measure(cell: Cell, task: Task, built: Built | None = None) -> dict[str, Any]:
    """Train once and score on the validation rows (kind search) or on the test rows.

    Args:
        cell: the run.
        task: of the cell's seed.
        built: the model of the cell, which stays untrained; it is built if missing.
    """
    built = built or Built.of(cell.method, task, cell.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    others = living(device)
    model = copy.deepcopy(built.model)
    judge = task.judge if cell.kind == "score" else None
    name = task.metric if task.judge is None or judge is not None else "perplexity"
    metric = METRICS[name]
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                learning_rate=cell.learning_rate,
                max_steps=cell.steps,
                warmup_steps=0.1,
                seed=cell.seed,
                per_device_train_batch_size=cell.batch_size,
                per_device_eval_batch_size=2 * cell.batch_size,
                train_sampling_strategy="sequential",
                save_strategy="no",
                logging_steps=1.0,
                report_to="none",
                disable_tqdm=True,
                prediction_loss_only=metric.of_loss,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=in_order(task.train, cell.steps, cell.batch_size, cell.seed),
            data_collator=task.collate,
        )
        trainer.remove_callback(PrinterCallback)
        start_wall = time.perf_counter()
        start_cpu = time.process_time()
        trains = count_trained(model) > 0
        train_loss = trainer.train().training_loss if trains else None
        wall = time.perf_counter() - start_wall
        cpu = time.process_time() - start_cpu
        peak = peak_bytes(trainer, task, cell) - others if trains else None
        split = "validation" if cell.kind == "search" else "test"
        scored = task.validation if cell.kind == "search" else task.test
        if judge is None:
            found = trainer.predict(scored)
            value, loss = metric.score(found), found.metrics["test_loss"]
        else:
            value, loss = judge(model, scored)
    return {
        "split": split,
        "n": len(scored),
        "metric": name,
        "value": value,
        "loss": loss,
        "train_loss": train_loss,
        "trained_parameters": count_trained(model),
        "head_parameters": built.head_parameters,
        "build_s": built.seconds,
        "train_s": wall,
        "cpu_s": cpu,
        "peak_bytes": peak,
    }


def count_trained(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_bytes(trainer: Trainer, task: Task, cell: Cell) -> int:
    """Peak bytes of a training step on the longest rows, with the optimizer's state.

    Call it at the end of training: the learning rate is then 0, so the steps change no weight.
    """
    longest = sorted(task.train, key=lambda row: -len(row.get("input_ids", ())))[: cell.batch_size]
    batch = trainer._prepare_inputs(task.collate(longest))

    def step() -> None:
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()
    return tensor_peak(step, trainer.args.device.type)


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
