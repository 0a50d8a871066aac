"""qrefta evaluate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qrefta.cli.console import console, quiet_libraries
from qrefta.cli.dtype import Dtype, computing_dtype
from qrefta.cli.options import Device, LanguageModel, TrustRemoteCode


def evaluate(
    model: LanguageModel,
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks of lm-evaluation-harness.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text file: measure perplexity. Repeat the option for more files."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="With --text: model to compare with, by KL divergence."),
    ] = None,
    window: Annotated[int, typer.Option(help="With --text: tokens of a window.")] = 512,
    card: Annotated[
        bool,
        typer.Option("--card", help="With --reference: write the result to MODEL's model card."),
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with further task files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task; windows of each text.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Rows of a task at a time, or auto.")] = "8",
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a language model: its distance to a reference on texts, or its scores on tasks.

    Tasks are run by lm-evaluation-harness.
    """
    if reference is not None and not text:
        raise ValueError("--reference needs a text to compare on; add --text FILE")
    if card and reference is None:
        raise ValueError("--card writes a comparison; add --reference BASE and --text FILE")
    if not tasks and not text:
        raise ValueError("nothing to measure; give tasks, or a text file by --text")
    if not tasks and (include_path is not None or num_fewshot is not None):
        raise ValueError("--include-path and --num-fewshot belong to tasks, and no task is given")
    if tasks and model.endswith(".gguf"):
        raise ValueError(f"tasks need a folder or hub name, and {model} is a file; use --text")
    quiet_libraries(data=bool(tasks))
    if card:
        from qrefta.measure.card import check_card

        check_card(model)  # before minutes of measuring
    sources = [model] if reference is None else [model, reference]
    chosen = computing_dtype(sources, dtype, device, trust_remote_code)
    loading = {"device": device, "dtype": chosen, "trust_remote_code": trust_remote_code}
    if text:
        _compare(model, reference, text, card, window=window, limit=limit, **loading)
    if not tasks:
        return
    from qrefta.measure.harness import evaluate as evaluate_model
    from qrefta.tables import scores_table

    scores = evaluate_model(
        model,
        tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        **loading,
    )
    console.print(scores_table(scores["results"]))


def _compare(
    model: str, reference: str | None, texts: list[str], card: bool, **options: Any
) -> None:
    """Measure a model on texts, print the result and, if asked, write it to the model card."""
    from qrefta.measure.card import write_comparison
    from qrefta.measure.compare import compare
    from qrefta.tables import comparison_table

    comparisons = compare(model, reference, texts, **options)
    console.print(comparison_table(comparisons))
    if card:
        write_comparison(model, comparisons)
