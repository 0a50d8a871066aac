"""Whether a split with less error starts training at a lower loss and ends better.

With a fresh head every split starts at the loss of guessing. So the head is trained first, on the
dense model with frozen weights. Then each kind of split of this model is scored, trained with the
same rows, order and steps, and scored again. Each kind and seed has a row.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import qrefta
from eval.rows import append
from eval.tasks.demo import model_folder
from eval.tasks.task import DatasetOption, HeaderOption, load_task
from qrefta.cli import guarded, quiet_libraries
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from qrefta.train.run import FinetuneResult

HEAD = ["pooler"]  # trained together with the classifier
SPLITS: dict[str, dict[str, Any]] = {
    "16 bit": {"bits": 16},
    "one shot": {"refine": 0},
    "refined": {},
    "calibrated": {},
}
console = Console()


def run(
    dataset: DatasetOption = None,
    header: HeaderOption = None,
    rank: Annotated[int, typer.Option(help="R of every stack.")] = 48,
    quant_type: Annotated[str, typer.Option(help="4-bit format.")] = "nf4",
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. n-1 of heads, rows and batch order.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps for the head, and for each split.")] = 100,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the head and of the splits.")
    ] = 1e-3,
    train_rows: Annotated[int, typer.Option(help="Most training rows.")] = 2000,
    test_rows: Annotated[int, typer.Option(help="Most test rows.")] = 2000,
    samples: Annotated[int, typer.Option(help="Training texts for calibration.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path(
        "runs/split_training"
    ),
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Train from every kind of split and compare starts and ends."""
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    for seed in range(seeds):
        data = load_task(dataset, header, seed, train_rows, test_rows)
        settings = {
            "learning_rate": learning_rate,
            "max_steps": steps,
            "seed": seed,
            "save_steps": 1.0,
            "disable_tqdm": True,
        }
        dense = load_classifier(str(model_folder()), data["train"].features["label"].names, seed)
        freeze_body(dense)
        args = training_arguments("classify", out / f"head{seed}", **settings)
        results = {"head only": finetune(dense, tokenizer, data, args=args)}
        batches = batches_of(data["train"]["text"][:samples], tokenizer)
        for name, options in SPLITS.items():
            model = qrefta.prepare(
                copy.deepcopy(dense),
                method="refta",
                rank=rank,
                quant_type=quant_type,
                modules_to_save=HEAD,
                **options,
                calibration=batches if name == "calibrated" else None,
            )
            args = training_arguments("classify", out / f"{name} {seed}", **settings)
            results[name] = finetune(model, tokenizer, data, args=args)
        found = [row(name, result, len(data["test"])) for name, result in results.items()]
        for one in found:
            console.print(
                f"seed {seed}, {one['split']}: test loss {one['test_loss_before']:.4f} -> "
                f"{one['test_loss']:.4f}, "
                f"accuracy {one['accuracy_before']:.1%} -> {one['accuracy_after']:.1%}"
            )
        if rows is not None:
            fixed = {
                "study": "split_training",
                "dataset": dataset or "docstring sentences",
                "rank": rank,
                "quant_type": quant_type,
                "learning_rate": learning_rate,
            }
            append(rows, [fixed | one for one in found], seed=seed)


def freeze_body(model: PreTrainedModel) -> None:
    """Leave only the classifier and the pooler trainable."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad = any(name in path for name in (*HEAD, "classifier"))


def batches_of(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, size: int = 16
) -> list[dict[str, torch.Tensor]]:
    """Padded batches for calibration."""
    starts = range(0, len(texts), size)
    return [
        tokenizer(texts[at : at + size], padding=True, truncation=True, return_tensors="pt")
        for at in starts
    ]


def row(split: str, result: FinetuneResult, n: int) -> dict[str, Any]:
    return {"kind": "training", "split": split, "n": n} | result._asdict()


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
