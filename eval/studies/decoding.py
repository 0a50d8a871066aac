"""Tokens per second of generation, compared with the plain bitsandbytes 4-bit model.

Greedy decoding with a key-value cache and random weights. The prompt is excluded: the time of a run
with one new token is subtracted. Values are medians over alternated repetitions.
"""

from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from eval.rows import append
from eval.studies.cost import SETTINGS, Run, build, timed
from qrefta.cli import guarded

PLAIN = "floor bitsandbytes"
console = Console()


def run(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "cpu",
    ranks: Annotated[str, typer.Option(help="Values of R, separated by commas.")] = "16,64",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each sequence.")] = 33,
    repetitions: Annotated[
        int, typer.Option(help="Alternated runs per model, after a first one.")
    ] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure every model at every batch size."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    shared = Run(
        setting,
        "cuda" if cuda else "cpu",
        torch.bfloat16 if cuda else torch.float32,
        checkpointing=False,
    )
    names = [PLAIN, "floor", "qlora r=16", *(f"qrefta R={rank}" for rank in ranks.split(","))]
    models = {name: build(name, shared).eval() for name in names}
    found = []
    for batch in map(int, batches.split(",")):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            SETTINGS[setting].config["vocab_size"], (batch, prompt), generator=generator
        )
        ids = ids.to(shared.device)
        times: dict[str, list[float]] = {name: [] for name in names}
        for repetition in range(repetitions + 1):
            for name, model in models.items():
                seconds = _seconds(model, ids, new_tokens, cuda) - _seconds(model, ids, 1, cuda)
                times[name] += [seconds] if repetition else []
        speeds = {name: batch * (new_tokens - 1) / median(values) for name, values in times.items()}
        for name, speed in speeds.items():
            row = {
                "kind": "decoding",
                "setting": setting,
                "method": name,
                "batch": batch,
                "prompt": prompt,
                "new_tokens": new_tokens,
                "n": repetitions,
                "dtype": str(shared.dtype).removeprefix("torch."),
                "tokens_per_s": speed,
                "of_bitsandbytes": speed / speeds[PLAIN],
            }
            found.append(row)
            console.print(
                f"batch {batch}, {name}: {speed:.1f} tokens/s, {row['of_bitsandbytes']:.3f} times "
                f"bitsandbytes"
            )
    if rows is not None:
        append(rows, [{"study": "decoding"} | row for row in found], seed=0)


def _seconds(model: nn.Module, ids: torch.Tensor, new_tokens: int, cuda: bool) -> float:
    options = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), cuda)


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
