"""4-bit fine-tuning of transformers models with shared low-rank factors."""

# Only light imports here and in the modules of the commands: `qrefta --help` and a mistyped command
# must not wait for torch. Every command imports what it needs; the choices of options come from
# `qrefta.choices`, which imports nothing.

import warnings
from typing import Any

import typer

from qrefta.cli import chat, evaluate, export, finetune, inspect, plan, prepare
from qrefta.cli.console import guarded, quiet_libraries
from qrefta.cli.options import CheckpointingCommand
from qrefta.recipe import RecipeCommand

__all__ = ["app", "guarded", "main", "quiet_libraries"]


class FinetuneCommand(CheckpointingCommand, RecipeCommand):
    """It takes a recipe, and --gradient-checkpointing without a value."""


app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
app.command()(prepare.prepare)
app.command(cls=FinetuneCommand)(finetune.finetune)
app.command()(inspect.inspect)
app.command()(inspect.verify)
app.command()(export.merge)
app.command()(export.consolidate)
app.command(name="export-lora")(export.export_lora)
app.command(name="export-gguf")(export.export_gguf)
app.command(cls=CheckpointingCommand)(plan.plan)
app.command()(evaluate.evaluate)
app.command()(chat.chat)


def main() -> None:
    """Entry point."""
    warnings.formatwarning = _one_line
    guarded(app)


def _one_line(message: Warning | str, *_: Any) -> str:
    """A warning without the place in the code that it came from."""
    return f"Warning: {message}\n"
