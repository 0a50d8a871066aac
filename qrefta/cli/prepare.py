"""qrefta prepare."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qrefta.cli.calibrating import (
    KINDS,
    NONE,
    calibration_of,
    gather,
    load_dense,
    prepare_calibrated,
)
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.inspect import saved_config
from qrefta.cli.options import TrustRemoteCode, rounding_of, with_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    calibration_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text to calibrate on; default: 16384. More keep more."),
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
    """Store a checkpoint in 4 bits, with trainable factors.

    With text, the model is loaded to calibrate on it. With fewer than four bits or rank 0 its
    layers are then rounded in the order in which they run. Else weights are read a few rows at a
    time; this goes on after an interruption when the same command is given again.
    """
    quiet_libraries(data=False)
    from qrefta._prepare import prepare_checkpoint
    from qrefta.files.folders import JOURNAL, new_folder
    from qrefta.files.layout import weights_bytes
    from qrefta.files.sources import dense_bytes
    from qrefta.split.moments import load_moments
    from qrefta.tables import report_table

    rounding = rounding_of(settings)
    if calibration is None:
        calibration = NONE if moments is not None else calibration_of(model, max_memory)
    in_order = rounding.may_round_in_order and calibration != NONE and moments is None
    if rounding.must_round_in_order and not in_order:
        raise ValueError(
            "--rounding sequential reads text with the model in memory: give --calibration FILE or "
            "text, without --moments."
        )
    if calibration == NONE and calibration_tokens is not None:
        raise ValueError(
            f"--calibration-tokens is {calibration_tokens} and nothing is calibrated on; give "
            "--calibration FILE or text."
        )
    load = partial(
        load_dense,
        model,
        calibration,
        calibration_tokens,
        settings["seed"],
        max_memory,
        trust_remote_code,
    )
    if in_order and not (out / JOURNAL).exists():
        with new_folder(out) as folder:
            dense, batches = load()
            prepare_calibrated(dense, batches, calibration, settings | {"device": device})
            _save(dense, model, folder, trust_remote_code)
    else:
        gathered = None
        if calibration != NONE:
            gathered = gather(*load(), calibration)
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


def _save(prepared: "PreTrainedModel", source: str, folder: Path, trust_remote_code: bool) -> None:
    """Write a prepared model in the dtype of the files that it came from, with its tokenizer."""
    from transformers import AutoConfig

    from qrefta.export.write import copy_tokenizer
    from qrefta.files.sources import pretrained_source

    stored: Any = AutoConfig.from_pretrained(**pretrained_source(source, trust_remote_code)).dtype
    if stored is not None:
        prepared.to(stored)
    prepared.save_pretrained(folder)
    copy_tokenizer(prepared, folder)
