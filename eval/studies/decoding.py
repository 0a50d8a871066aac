"""Tokens per second of generation, compared with the plain bitsandbytes 4-bit model.

Greedy decoding with a key-value cache and random weights. The prompt is excluded: the time of a run
with one new token is subtracted. Values are medians over alternated repetitions.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any

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
    methods: Annotated[
        str, typer.Option(help="Methods of `eval.studies.cost`, separated by commas.")
    ] = "qlora r=16,qlora r=8,windows R=64,refta R=64",
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
    names = [PLAIN, "floor", *(name.strip() for name in methods.split(","))]
    found = measure(
        names, shared, [int(batch) for batch in batches.split(",")], prompt, new_tokens, repetitions
    )
    for row in found:
        console.print(
            f"batch {row['batch']}, {row['method']}: {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['of_bitsandbytes']:.3f} times bitsandbytes"
        )
    if rows is not None:
        append(rows, [{"study": "decoding"} | row for row in found], seed=0)


def measure(
    names: Sequence[str],
    settings: Run,
    batches: Sequence[int],
    prompt: int,
    new_tokens: int,
    repetitions: int,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for every model and batch size.

    Args:
        names: of the models, with `PLAIN`; see `eval.studies.cost.build`.
        settings: of all models.
        batches: sizes.
        prompt: tokens of the prompt.
        new_tokens: to generate for each sequence, at least 2.
        repetitions: alternated runs per model, after a first one.
        until: no further repetition begins after this time of `monotonic`, once there is one; each
            batch size gets its part of the time.
    """
    cuda = settings.device == "cuda"
    models = {name: build(name, settings).eval() for name in names}
    found = []
    for place, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(settings.config["vocab_size"], (batch, prompt), generator=generator)
        ids = ids.to(settings.device)
        times: dict[str, list[float]] = {name: [] for name in names}
        now = monotonic()
        batch_until = now + (until - now) / (len(batches) - place)
        for repetition in range(repetitions + 1):
            if repetition > 1 and monotonic() > batch_until:
                break
            for name, model in models.items():
                seconds = _seconds(model, ids, new_tokens, cuda) - _seconds(model, ids, 1, cuda)
                times[name] += [seconds] if repetition else []
        speeds = {name: batch * (new_tokens - 1) / median(values) for name, values in times.items()}
        for name, speed in speeds.items():
            found.append(
                {
                    "kind": "decoding",
                    "setting": settings.setting,
                    "layers": settings.config["num_hidden_layers"],
                    "method": name,
                    "batch": batch,
                    "prompt": prompt,
                    "new_tokens": new_tokens,
                    "n": len(times[name]),
                    "dtype": str(settings.dtype).removeprefix("torch."),
                    "tokens_per_s": speed,
                    "of_bitsandbytes": speed / speeds[PLAIN],
                }
            )
    return found


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
