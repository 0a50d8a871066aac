"""Time from a command to the end of its first training step, in a fresh process.

SmolLM2-135M-Instruct learns conversations as in `eval.studies.whole_step`. Included are imports,
loading, preparing in one shot without calibration, reading the data and the first step. TRL with
PEFT's QLoRA and `qrefta.finetune` run as there. `qrefta finetune` is the command itself: it also
scores the test rows before the first step, and ends here with its first checkpoint.

The methods alternate, one process at a time.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import AutoTokenizer

from eval.rows import append
from eval.studies.whole_step import Run, data_of, first_step
from eval.tasks.smollm2 import NAME, cache_folder, smollm2_folder
from qrefta.cli import guarded

COMMAND = "qrefta finetune R="
METHODS = ("trl qlora r=16", "qrefta R=64", f"{COMMAND}64")
STEPS = 4  # of the command, which saves after a quarter: after the first
POLL_S = 0.05
console = Console()


def run(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = ",".join(METHODS),
    model: Annotated[str | None, typer.Option(help=f"Folder; default: {NAME}.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Alternated repetitions.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure every method."""
    source = model or str(smollm2_folder(cache_folder()))
    settings = Run(source, STEPS * batch_size, batch_size, 0, False, True, threads)
    names = [name.strip() for name in methods.split(",")]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name, taken in times.items():
            measure = _command if name.startswith(COMMAND) else first_step
            taken.append(measure(name, settings))
    found: list[dict[str, Any]] = [
        {
            "study": "startup",
            "model": model or NAME,
            "method": name,
            "batch_size": batch_size,
            "repetitions": repetitions,
            "first_step_s": median(taken),
            "longest_s": max(taken),
        }
        for name, taken in times.items()
    ]
    for row in found:
        console.print(f"{row['method']}: {row['first_step_s']:.1f} s")
    if rows is not None:
        append(rows, found, seed=0)


def _command(name: str, settings: Run) -> float:
    """Seconds until `qrefta finetune` has saved its first checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    with TemporaryDirectory() as folder:
        data, out = Path(folder, "chat.jsonl"), Path(folder, "out")
        with data.open("w", encoding="utf-8") as file:
            for messages in data_of(settings, tokenizer)["messages"]:
                print(json.dumps({"messages": messages}), file=file)
        arguments = [
            sys.executable, "-m", "qrefta", "finetune", settings.model, str(data), str(out),
            "--task=sft", "--calibration=none", f"--rank={name.removeprefix(COMMAND)}",
            f"--max-steps={STEPS}", f"--batch-size={settings.batch_size}",
            "--gradient-checkpointing",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=environment)
        try:
            while not (out / "checkpoint-1").exists():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended without a checkpoint (see above)")
                time.sleep(POLL_S)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
