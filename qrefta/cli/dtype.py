"""The dtype that a command computes a language model in."""

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


def computing_dtype(
    sources: list[str], dtype: LoadDtype, device: str | None, trust_remote_code: bool
) -> Any:
    """The dtype to load some language models in; a line on stderr says so if it is not that of
    their files.

    Args:
        sources: folders, hub names or GGUF files.
        dtype: of the option.
        device: of the option.
        trust_remote_code: whether to run code that comes with a model.
    """
    import torch

    from qrefta.files.sources import pretrained_source
    from qrefta.model.dtype import loading_dtype

    if dtype != "auto":
        return getattr(torch, dtype)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for source in sources:
        named = pretrained_source(source, trust_remote_code)
        chosen = loading_dtype(named, torch.device(place).type)
        if chosen != "auto":
            Console(stderr=True).print(
                "In float32: this processor computes bfloat16 many times slower. --dtype bfloat16 "
                "keeps the files' dtype and takes half the memory.",
                style="dim",
            )
            return chosen
    return "auto"
