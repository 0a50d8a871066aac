"""qrefta prepare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qrefta.cli.calibrating import KINDS, NONE, calibration_of, gather
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.inspect import saved_config
from qrefta.cli.options import TrustRemoteCode, must_round_in_order, with_settings


@with_settings
def prepare(
    model: Annotated[
        str, typer.Argument(help="Hub name, local folder or .gguf file of a dense model.")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: new, empty, or left by an interrupted run."),
    ],
    settings: dict[str, Any],
    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"Text on which the outputs are kept: {KINDS}; default: text, if the model has a "
            "tokenizer and its files fit in --max-memory."
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="File of moments: written with --calibration, read without it."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device that splits the weights, such as cuda.")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory for preparing, on top of the imported libraries.")
    ] = "2GB",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Split a checkpoint into a 4-bit residual and trainable factors, a few rows at a time.

    An interrupted run goes on when the same command is given again. A GGUF file is prepared in
    memory.
    """
    if must_round_in_order(settings):
        raise ValueError(
            "--rounding sequential reads text with the model in memory, and this command holds no "
            "model: use it with qrefta finetune, or call qrefta.prepare in Python."
        )
    quiet_libraries(data=False)
    from qrefta._prepare import prepare_checkpoint
    from qrefta.files.layout import weights_bytes
    from qrefta.files.sources import dense_bytes
    from qrefta.split.calibrate import load_moments
    from qrefta.tables import report_table

    gathered = None
    if calibration is None:
        calibration = NONE if moments is not None else calibration_of(model, max_memory)
    if calibration != NONE:
        gathered = gather(model, calibration, settings["seed"], max_memory, trust_remote_code)
        if moments is not None:
            gathered.save(moments)
    elif moments is not None:
        gathered = load_moments(moments)
    prepare_checkpoint(
        model,
        out,
        moments=gathered,
        device=device or "cpu",
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    console.print(report_table([row.report() for row in saved_config(out).stacks]))
    console.print(f"{megabytes(dense_bytes(model))} -> {megabytes(weights_bytes(out))} in {out}")
