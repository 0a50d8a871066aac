"""The dtype that a command computes a language model in."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from qrefta.choices import LoadDtype

Dtype = Annotated[
    LoadDtype,
    typer.Option(
        help="Dtype of the model in memory; auto: as it is stored, but float32 on a processor that "
        "computes bfloat16 slowly."
    ),
]


def chosen_dtype(
    sources: list[str],
    dtype: LoadDtype,
    device: str,
    trust_remote_code: bool,
    note: Callable[[], None],
) -> Any:
    """The dtype to load some models in.

    Args:
        sources: folders, hub names or GGUF files.
        dtype: of the option.
        device: type of the device that computes.
        trust_remote_code: whether to run code that comes with a model.
        note: called if "auto" is another dtype than the files have.
    """
    import torch

    from qrefta.files.sources import pretrained_source
    from qrefta.model.dtype import loading_dtype

    if dtype != "auto":
        return getattr(torch, dtype)
    for source in sources:
        chosen = loading_dtype(pretrained_source(source, trust_remote_code), device)
        if chosen != "auto":
            note()
            return chosen
    return "auto"


def computing_dtype(
    sources: list[str], dtype: LoadDtype, device: str | None, trust_remote_code: bool
) -> Any:
    """The dtype to load some language models in, which write nothing; a line on stderr says so if
    the files have another one.
    """
    import torch

    def note() -> None:
        Console(stderr=True).print(
            "In float32: this processor computes bfloat16 many times slower. --dtype bfloat16 "
            "keeps the files' dtype and takes half the memory.",
            style="dim",
        )

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return chosen_dtype(sources, dtype, torch.device(place).type, trust_remote_code, note)
