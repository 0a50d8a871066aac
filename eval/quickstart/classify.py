"""A sentence classifier in 4 bits, next to 16-bit baselines.

Three classifiers train on the same rows in the same order: the head on frozen 16-bit weights, LoRA
and the head on 16-bit weights, and qrefta's factors and the head on 4-bit weights. LoRA and qrefta
adapt the same linear layers. The head is the classifier and, in BERT-like models, the pooler before
it, which sentence encoders leave untrained. The defaults need no download from a model hub.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import qrefta
from eval.peers.baselines import adapted_layers
from eval.quickstart import Options
from eval.rows import append
from eval.tasks.demo import docstring_sentences, model_folder
from qrefta import FinetuneResult, finetune
from qrefta.files.layout import weights_bytes
from qrefta.tables import report_table, results_table
from qrefta.train.arguments import training_arguments
from qrefta.train.data import load_classification
from qrefta.train.models import load_classifier

LEARNING_RATE = 2e-3
console = Console()


def run(
    options: Options,
    text_column: list[str] | None,
    label_column: str | None,
    header: list[str] | None,
) -> None:
    """Prepare, train, save, reload and merge a model in 4 bits, with two 16-bit baselines."""
    model, dataset, rank, steps, train_rows, test_rows, out, rows, seed = options
    source = model or str(model_folder())
    if dataset is None:
        data = docstring_sentences(train_size=train_rows, test_size=test_rows)
    else:
        data = load_classification(
            dataset, text_columns=text_column, label_column=label_column, header=header, seed=seed
        )
        data = first_rows(data, {"train": train_rows, "test": test_rows}, seed)
    classes = data["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(source)
    console.rule(
        f"{len(data['train'])} training and {len(data['test'])} test rows, {len(classes)} classes"
    )

    def train(name: str, classifier: PreTrainedModel) -> FinetuneResult:
        console.print(f"\nTraining: {name}")
        args = training_arguments(
            "classify",
            out / name.replace(" ", "-"),
            learning_rate=LEARNING_RATE,
            max_steps=steps,
            save_steps=1.0,
            seed=seed,
        )
        return finetune(classifier, tokenizer, data, args=args)

    results = {
        "head only": train("head only", head_only(load_16_bit(source, classes, seed))),
        "LoRA r=8": train("LoRA r=8", lora(load_16_bit(source, classes, seed))),
    }

    prepared = load_classifier(source, classes, seed)
    dense_bytes = sum(parameter.nbytes for parameter in prepared.parameters())
    qrefta.prepare(prepared, bits=4, rank=rank, modules_to_save=pooler(prepared), seed=seed)
    console.print(report_table(qrefta.quant_report(prepared)))
    results["qrefta"] = train("qrefta", prepared)
    console.print()
    console.print(results_table(results))
    files = check_files(prepared, tokenizer, data, out / "qrefta", dense_bytes)
    show_files(files, out / "qrefta")
    if rows is not None:
        append(
            rows, to_rows(qrefta.quant_report(prepared), results, files, len(data["test"])), seed
        )


def first_rows(data: DatasetDict, counts: dict[str, int], seed: int) -> DatasetDict:
    """At most `counts` rows of each split, drawn with `seed`."""
    return DatasetDict(
        {
            name: part.shuffle(seed=seed).select(range(min(counts[name], len(part))))
            for name, part in data.items()
        }
    )


def load_16_bit(source: str, classes: list[str], seed: int) -> PreTrainedModel:
    """A classifier with weights rounded to bf16 that computes in float32, like the 4-bit model."""
    return load_classifier(source, classes, seed).to(torch.bfloat16).float()


def pooler(classifier: PreTrainedModel) -> list[str]:
    """The pooler, if the model has one between its blocks and its classifier."""
    return [name for name, _ in classifier.base_model.named_children() if name == "pooler"]


def head_only(classifier: PreTrainedModel) -> PreTrainedModel:
    classifier.base_model.requires_grad_(False)
    for name in pooler(classifier):
        classifier.base_model.get_submodule(name).requires_grad_(True)
    return classifier


def lora(classifier: PreTrainedModel) -> PreTrainedModel:
    targets = adapted_layers(classifier)
    heads = pooler(classifier)
    return get_peft_model(
        classifier,
        LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, modules_to_save=heads, task_type="SEQ_CLS"
        ),
    )


@torch.no_grad()
def check_files(
    trained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    folder: Path,
    dense_bytes: int,
) -> dict[str, float]:
    """Reload and merge the saved model: sizes in bytes, and largest differences in test logits."""
    sample = data["test"][:64]
    texts = [sample[name] for name in ("text", "text_pair") if name in sample]
    batch = tokenizer(
        *texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    ).to(trained.device)
    saved = trained.eval()(**batch).logits
    reloaded = qrefta.load(folder).to(trained.device).eval()
    reload_difference = (reloaded(**batch).logits - saved).abs().max().item()
    merged = qrefta.merge(reloaded)
    merged.save_pretrained(folder.parent / "merged")
    rows = qrefta.quant_report(trained)
    return {
        "linears_16_bit_bytes": 2
        * sum(row["layers"] * row["shape"][0] * row["shape"][1] for row in rows),
        "linears_bytes": sum(row["bytes"] for row in rows),
        "model_bytes_before": dense_bytes,
        "model_bytes_after": weights_bytes(folder),
        "largest_logit": saved.abs().max().item(),
        "reload_difference": reload_difference,
        "merge_difference": (merged(**batch).logits.float() - saved).abs().max().item(),
    }


def show_files(files: dict[str, float], folder: Path) -> None:
    """Print the results of `check_files`."""
    size = {
        name: f"{value / 1e6:.1f} MB"
        for name, value in files.items()
        if name.endswith(("bytes", "before", "after"))
    }
    console.print(
        f"linear layers          {size['linears_16_bit_bytes']} in 16 bits -> "
        f"{size['linears_bytes']}"
    )
    console.print(
        f"whole model            {size['model_bytes_before']} -> {size['model_bytes_after']} in "
        f"file"
    )
    console.print(
        f"reloaded model         logits differ by {files['reload_difference']:.1e} from the saved "
        f"model's"
    )
    console.print(
        f"merged to dense bf16   by {files['merge_difference']:.1e}, of "
        f"{files['largest_logit']:.1f} at most"
    )
    console.print(
        f"\nThe trained model is in {folder}, the merged one in {folder.parent / 'merged'}."
    )


def to_rows(
    report: list[dict[str, Any]],
    results: dict[str, FinetuneResult],
    files: dict[str, float],
    test_rows: int,
) -> list[dict[str, Any]]:
    """All printed figures as rows for `eval.rows`."""
    rows = [{"study": "quickstart", "kind": "stack"} | row for row in report]
    for name, result in results.items():
        error = (result.accuracy_after * (1 - result.accuracy_after) / test_rows) ** 0.5
        row = {
            "study": "quickstart",
            "kind": "training",
            "method": name,
            "n": test_rows,
            "standard_error": error,
        }
        rows.append(row | result._asdict())
    return [*rows, {"study": "quickstart", "kind": "files"} | files]
