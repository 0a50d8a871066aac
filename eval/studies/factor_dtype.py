"""Training with bf16 factors compared with float32 factors, otherwise equal runs.

The learning rate is 2e-4, where plain AdamW on bf16 parameters loses most updates. Each run and
seed has a row: the share of factor entries whose bf16 value changes, and losses.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import DatasetDict
from rich.console import Console
from transformers import AutoTokenizer

import qrefta
from eval.rows import append
from eval.tasks.demo import model_folder
from eval.tasks.task import DatasetOption, HeaderOption, load_task
from qrefta.cli import guarded, quiet_libraries
from qrefta.config.stack import BANK
from qrefta.train.arguments import training_arguments
from qrefta.train.models import load_classifier

RUNS = [("float32", "adamw_torch"), ("bfloat16", "adamw_torch"), ("bfloat16", "adamw_8bit")]
console = Console()


def run(
    dataset: DatasetOption = None,
    header: HeaderOption = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. n-1 of head, rows and batch order.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    rank: Annotated[int, typer.Option(help="R of every stack.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    train_rows: Annotated[int, typer.Option(help="Most training rows.")] = 3200,
    test_rows: Annotated[int, typer.Option(help="Most test rows.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("runs/factor_dtype"),
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Train from the same start with each factor dtype and optimizer."""
    quiet_libraries()
    fixed = {
        "study": "factor_dtype",
        "dataset": dataset or "docstring sentences",
        "rank": rank,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    for seed in range(seeds):
        data = load_task(dataset, header, seed, train_rows, test_rows)
        found = [
            measure(
                data, *kind, seed, steps, rank, batch_size, learning_rate, out / f"{seed}-{number}"
            )
            for number, kind in enumerate(RUNS)
        ]
        reference = found[0]
        for row in found:
            row |= {
                f"{name}_of_float32": row[name] / reference[name]
                for name in ("train_loss", "test_loss")
            }
            console.print(f"seed {seed}: {row}")
        if rows is not None:
            append(rows, [fixed | row for row in found], seed=seed)


def measure(
    data: DatasetDict,
    factor_dtype: str,
    optimizer: str,
    seed: int,
    steps: int,
    rank: int,
    batch_size: int,
    learning_rate: float,
    out: Path,
) -> dict[str, Any]:
    """One run: losses, and the share of factor entries whose bf16 value changed."""
    model = load_classifier(str(model_folder()), data["train"].features["label"].names, seed)
    qrefta.prepare(model, method="refta", rank=rank, factor_dtype=factor_dtype, progress=False)
    before = copy.deepcopy(getattr(model, BANK))
    args = training_arguments(
        "classify",
        out,
        learning_rate=learning_rate,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        save_steps=1.0,
        optim=optimizer,
        seed=seed,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    result = qrefta.finetune(model, tokenizer, data, args=args)
    pairs = list(zip(before.parameters(), getattr(model, BANK).parameters(), strict=True))
    trained = [(old, new) for old, new in pairs if new.requires_grad]
    moved = sum((old.bfloat16() != new.bfloat16()).sum().item() for old, new in trained)
    return {
        "factor_dtype": factor_dtype,
        "optimizer": optimizer,
        "n": len(data["test"]),
        "moved": moved / sum(new.numel() for _, new in trained),
        "train_loss": result.train_loss,
        "test_loss": result.test_loss,
        "accuracy": result.accuracy_after,
    }


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
