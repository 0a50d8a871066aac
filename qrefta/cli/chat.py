"""qrefta chat."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from qrefta.cli.console import console, quiet_libraries
from qrefta.cli.dtype import Dtype, computing_dtype
from qrefta.cli.options import Device, LanguageModel, TrustRemoteCode


def chat(
    model: LanguageModel,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0: the most likely token.")
    ] = 0.0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a language model in the terminal, or answer the lines of standard input.

    /new begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    quiet_libraries(data=False)
    from qrefta.chat import conversation, talk

    opened = conversation(
        model,
        device,
        trust_remote_code,
        computing_dtype([model], dtype, device, trust_remote_code),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    if sys.stdin.isatty():
        console.print("/new begins a new conversation, /exit or Ctrl-D ends it.", style="dim")
    talk(opened, _typed(), lambda part: print(part, end="", flush=True))


def _typed() -> Iterator[str]:
    """Lines of the terminal, behind a prompt, or of standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield console.input(Text("> ", "bold"))
        except (EOFError, KeyboardInterrupt):
            print()
            return
