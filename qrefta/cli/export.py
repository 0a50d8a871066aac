"""qrefta merge, export-lora and export-gguf: a prepared model in forms that load without qrefta.

And qrefta consolidate: the parts of a sharded checkpoint as one prepared folder.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qrefta.choices import Dtype, GgufType, LoraBase
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.options import Folder, Inputs, NewFolder, Tolerance, TrustRemoteCode

if TYPE_CHECKING:
    from torch import Tensor

    from qrefta.export.result import Export


def merge(
    folder: Folder,
    out: NewFolder,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the merged model.")] = "bfloat16",
    inputs: Inputs = None,
    tolerance: Tolerance = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a plain dense transformers model that loads without qrefta."""
    quiet_libraries(data=False)
    import torch

    from qrefta.export.merge import merge as merge_model
    from qrefta.export.result import ROUNDING_TOLERANCE
    from qrefta.files.folders import check_new
    from qrefta.files.layout import weights_bytes
    from qrefta.model.load import load

    check_new(out)
    allowed = ROUNDING_TOLERANCE if tolerance is None else tolerance
    batch = _read_batch(inputs)
    model = load(folder, trust_remote_code=trust_remote_code)
    written = merge_model(model, getattr(torch, dtype), out=out, inputs=batch, tolerance=allowed)
    before = megabytes(weights_bytes(folder))
    console.print(f"{before} -> {megabytes(weights_bytes(out))} {dtype} in {out}")
    _print_differences(written)


def consolidate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint that the processes of a sharded run wrote in parts.")
    ],
    base: Annotated[
        Path, typer.Argument(help="Folder of the prepared model that the run started from.")
    ],
    out: NewFolder,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a sharded checkpoint as one ordinary folder of a prepared model."""
    quiet_libraries(data=False)
    from qrefta.export.consolidate import consolidate as consolidate_checkpoint
    from qrefta.files.layout import weights_bytes

    consolidate_checkpoint(checkpoint, base, out, trust_remote_code=trust_remote_code)
    console.print(f"{megabytes(weights_bytes(out))} in {out}")


def export_lora(
    folder: Folder,
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder to write, new or empty: the adapter, with --base residual also the base."
        ),
    ],
    base: Annotated[LoraBase, typer.Option(help="Base model of the LoRA.")] = "residual",
    original: Annotated[
        str | None,
        typer.Option(
            help="With --base original: folder or hub name; default: the model that was prepared."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="With --base original: folder of the prepared model before training; needed for "
            "methods that start from the weights, such as refta, if the split was calibrated."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA; default: the factors' rank, on the original twice that for "
            "refta and craft."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of LoRA and base.")] = "bfloat16",
    inputs: Inputs = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference of logits.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the factors as a LoRA that PEFT and servers load, with its base model."""
    quiet_libraries(data=False)
    import torch

    from qrefta.export.lora import export_lora as export_lora_model
    from qrefta.files.folders import check_new
    from qrefta.files.layout import weights_bytes
    from qrefta.model.load import load

    check_new(out)
    written = export_lora_model(
        load(folder, trust_remote_code=trust_remote_code),
        out,
        base,
        original=original,
        start=start,
        rank=rank,
        dtype=getattr(torch, dtype),
        inputs=_read_batch(inputs),
        tolerance=tolerance,
    )
    told = f"LoRA of the {base} in {out} ({megabytes(weights_bytes(out))})"
    if (out / "base").is_dir():
        told += f", its base in {out / 'base'} ({megabytes(weights_bytes(out / 'base'))})"
    console.print(told)
    _print_differences(written)


def export_gguf(
    model: Annotated[
        str, typer.Argument(help="Folder of a prepared, merged or other dense model; or hub name.")
    ],
    file: Annotated[Path, typer.Argument(help="File to write; its name ends in .gguf.")],
    kind: Annotated[
        GgufType, typer.Option("--type", help="16, 8.5 or 4.5 bits a weight.")
    ] = "q8_0",
    tolerance: Tolerance = None,
) -> None:
    """Write one file for llama.cpp and Ollama, tokenizer included, and a Modelfile next to it."""
    quiet_libraries(data=False)
    from qrefta.export.gguf import export_gguf as export_gguf_model

    written = export_gguf_model(model, file, kind, tolerance=tolerance)
    console.print(f"{kind} in {file} ({megabytes(file.stat().st_size)})")
    _print_differences(written)


def _read_batch(file: Path | None) -> "dict[str, Tensor] | None":
    """The tensors of a safetensors file; None without a file.

    Raises:
        ValueError: if there is no such file, or it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file is None:
        return None
    if not file.is_file():
        raise ValueError(f"There is no file {file}; --inputs takes a safetensors file of a batch.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file ({error}). Write the batch in Python: "
            "safetensors.torch.save_file(dict(batch), file)"
        ) from error


def _print_differences(written: "Export") -> None:
    """How far an export is from the prepared model, and its notes."""
    console.print(f"Logits differ from the model's by {written.difference:.2g} of their size.")
    if written.weight_error:
        console.print(
            f"The LoRA leaves out {written.weight_error:.2g} of the squared norm of the exact "
            "update."
        )
    for note in written.notes:
        console.print(f"Note: {note}.")
