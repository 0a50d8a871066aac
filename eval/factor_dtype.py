"""python -m eval.factor_dtype: do bf16 factors train? The same run with bf16 and with float32 factors.

Plain Trainer, its default AdamW, learning rate 2e-4: the share of factor entries that move as bf16 values, and losses.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

import qrefta
from eval.demo import docstring_sentences, model_folder
from eval.rows import append
from qrefta.cli import load_classifier, quiet_libraries
from qrefta.factors import BANK

console = Console()


def run(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    rank: Annotated[int, typer.Option(help="R of every stack.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("runs/factor_dtype"),
    rows: Annotated[Path | None, typer.Option(help="File to add the measurements to, as JSON lines.")] = None,
) -> None:
    """Train twice, on the embedded model and sentences, and compare."""
    quiet_libraries()
    found = [measure(name, steps, rank, batch_size, out / name) for name in ("bfloat16", "float32")]
    for row in found:
        console.print(row)
    if rows is not None:
        append(rows, [{"study": "factor_dtype"} | row for row in found], seed=0)


def measure(factor_dtype: str, steps: int, rank: int, batch_size: int, out: Path) -> dict[str, Any]:
    """One run: losses, and the share of factor entries whose bf16 value changed."""
    data = docstring_sentences(train_size=2000, test_size=500)
    model = load_classifier(str(model_folder()), data["train"].features["label"].names, seed=0)
    qrefta.prepare(model, rank=rank, factor_dtype=factor_dtype)
    before = copy.deepcopy(getattr(model, BANK))
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    result = qrefta.finetune(
        model, tokenizer, data, out, learning_rate=2e-4, max_steps=steps, batch_size=batch_size, save_steps=1.0
    )
    pairs = list(zip(before.parameters(), getattr(model, BANK).parameters(), strict=True))
    trained = [(old, new) for old, new in pairs if new.requires_grad]
    moved = sum((old.bfloat16() != new.bfloat16()).sum().item() for old, new in trained)
    return {
        "factor_dtype": factor_dtype,
        "rank": rank,
        "steps": steps,
        "batch_size": batch_size,
        "n": len(data["test"]),
        "moved": moved / sum(new.numel() for _, new in trained),
        "train_loss": result.train_loss,
        "test_loss": result.test_loss,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(run)
