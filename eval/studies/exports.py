"""Difference of each export from the trained model: logits, weights and test accuracy.

One model is fine-tuned and exported in every form. Each form is loaded with the library that users
load it with, and scored on the same rows. `nearest by weights` is the best LoRA of rank 2R on the
original weights for the whole difference, quantization error included.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import qrefta
from eval.rows import append
from eval.studies.split_training import batches_of
from eval.tasks.demo import model_folder
from eval.tasks.task import DatasetOption, HeaderOption, load_task
from qrefta.cli import guarded, quiet_libraries
from qrefta.config.settings import Settings
from qrefta.export.compare import output_difference
from qrefta.export.result import Export
from qrefta.files.layout import weights_bytes
from qrefta.nn.linear import AdaptedLinear
from qrefta.train.arguments import training_arguments
from qrefta.train.models import load_classifier

console = Console()


def run(
    dataset: DatasetOption = None,
    header: HeaderOption = None,
    method: Annotated[str, typer.Option(help="Tensor method.")] = Settings.method,
    rank: Annotated[int, typer.Option(help="R of every stack.")] = 48,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    train_rows: Annotated[int, typer.Option(help="Most training rows.")] = 3200,
    test_rows: Annotated[int, typer.Option(help="Most test rows.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of head, rows and batch order.")] = 0,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Fine-tune once, export in every form, and compare."""
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    data = load_task(dataset, header, seed, train_rows, test_rows)
    model = load_classifier(str(model_folder()), data["train"].features["label"].names, seed)
    dense = {
        path: module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    qrefta.prepare(model, rank=rank, method=method, modules_to_save=["pooler"], progress=False)
    batches = batches_of(data["test"]["text"], tokenizer, 32)
    labels = torch.tensor(data["test"]["label"])
    originals = {
        path: dense[path]
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }
    with TemporaryDirectory() as folder:
        root = Path(folder)
        args = training_arguments(
            "classify",
            root / "trained",
            learning_rate=learning_rate,
            max_steps=steps,
            save_steps=1.0,
            seed=seed,
            disable_tqdm=True,
        )
        qrefta.finetune(model, tokenizer, data, args=args)
        expected = logits(model, batches)
        found = [
            scored("prepared", expected, expected, labels, size=weights_bytes(root / "trained"))
        ]
        for name, settings in forms(rank if method == "refta" else None).items():
            written = export(model, root / name.replace(" ", "-"), settings)
            size = sum(weights_bytes(part) for part in (written.folder, written.folder / "base"))
            loaded = load(written.folder, settings, model_folder(), model.config.num_labels)
            found.append(
                scored(name, logits(loaded, batches), expected, labels, size)
                | {"weight_error": written.weight_error}
            )
    found.append(nearest_by_weights(model, originals, 2 * rank, batches, expected, labels))
    for row in found:
        console.print(row)
    if rows is not None:
        fixed = {
            "study": "exports",
            "dataset": dataset or "docstring sentences",
            "method": method,
            "rank": rank,
            "steps": steps,
            "learning_rate": learning_rate,
            "n": len(labels),
        }
        append(rows, [fixed | row for row in found], seed=seed)


def forms(rank: int | None) -> dict[str, dict[str, Any]]:
    """Settings of `export_lora` by name; forms without `base` are merged.

    LoRAs on the original have rank 2 `rank`, `rank` and 8.
    """
    cut = (
        {}
        if rank is None
        else {f"LoRA r={r} on the original": {"base": "original", "rank": r} for r in (rank, 8)}
    )
    return {
        "merged bf16": {},
        "merged float32": {"dtype": torch.float32},
        "LoRA on the residual": {"base": "residual"},
        "LoRA on the 4-bit residual": {"base": "residual-4bit"},
        "LoRA on the original": {"base": "original"},
    } | cut


def export(model: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> Export:
    if "base" in settings:
        return qrefta.export_lora(model, folder, **settings, tolerance=float("inf"))
    return qrefta.merge(model, out=folder, **settings, tolerance=float("inf"))


def load(folder: Path, settings: dict[str, Any], original: str | Path, classes: int) -> nn.Module:
    """Load an export as a user does, without qrefta."""
    dtype = settings.get("dtype", torch.bfloat16)
    if "base" not in settings:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    if settings["base"] == "original":
        base = AutoModelForSequenceClassification.from_pretrained(
            original, dtype=dtype, num_labels=classes
        )
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder)


@torch.no_grad()
def nearest_by_weights(
    model: PreTrainedModel,
    originals: dict[str, Tensor],
    rank: int,
    batches: list[dict[str, Tensor]],
    expected: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """The row of the original plus the best rank-`rank` update towards the merged weights.

    The model is merged in place.
    """
    merged = qrefta.merge(model, torch.float32)
    missing = 0.0
    norm = 0.0
    for path, original in originals.items():
        weight = merged.get_submodule(path).weight
        change = weight - original
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        missing += values[rank:].square().sum().item()
        norm += values.square().sum().item()
        weight.copy_(original + (left[:, :rank] * values[:rank]) @ right[:rank])
    row = scored("nearest by weights", logits(merged, batches), expected, labels, size=None)
    return row | {"weight_error": missing / norm}


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model.eval()(**batch).logits.float() for batch in batches])


def scored(
    form: str, found: Tensor, expected: Tensor, labels: Tensor, size: int | None
) -> dict[str, Any]:
    """A row: difference of logits, share of equal predictions, accuracy."""
    predicted = found.argmax(-1)
    return {
        "kind": "export",
        "form": form,
        "difference": output_difference(found, expected),
        "agreement": (predicted == expected.argmax(-1)).float().mean().item(),
        "accuracy": (predicted == labels).float().mean().item(),
        "weights_bytes": size,
    }


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
