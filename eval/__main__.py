"""python -m eval: list the studies. python -m eval NAME ...: run one; python -m eval NAME --help:
its options.
"""

import inspect
import sys
from importlib import import_module
from typing import NamedTuple

import typer
from rich.console import Console
from rich.table import Table


class Entry(NamedTuple):
    """A module with a function `run`, and the line that the list of studies shows for it."""

    module: str
    line: str


STUDIES = {
    "accuracy": Entry("eval.studies.accuracy", "fine-tune with every method and score"),
    "quant_error": Entry("eval.studies.quant_error", "quantization error by method and rank"),
    "kld": Entry("eval.studies.kld", "KL divergence of 4-bit bases to the 16-bit model"),
    "rounding_options": Entry(
        "eval.studies.rounding_options", "additions to error feedback that prepare leaves out"
    ),
    "cosine": Entry(
        "eval.studies.cosine", "sentence embeddings of 4-bit bases and the 16-bit model"
    ),
    "calibration_cost": Entry(
        "eval.studies.calibration_cost", "time of gathering second moments in forward passes"
    ),
    "cost": Entry("eval.studies.cost", "time and memory of a training step"),
    "whole_step": Entry("eval.studies.whole_step", "time and memory of a chat model's whole step"),
    "startup": Entry("eval.studies.startup", "time from a command to its first training step"),
    "cost_model": Entry("eval.studies.cost_model", "measured times against counted operations"),
    "decoding": Entry("eval.studies.decoding", "tokens per second of generation"),
    "coverage": Entry("eval.studies.coverage", "share of a model's weights in 4 bits"),
    "exports": Entry("eval.studies.exports", "difference of each export from the trained model"),
    "factor_dtype": Entry("eval.studies.factor_dtype", "bf16 against float32 factors in training"),
    "gpu": Entry("eval.studies.gpu", "tests, time and memory on one GPU in a few minutes"),
    "init_cost": Entry("eval.studies.init_cost", "time and memory of splitting a stack"),
    "out_of_core": Entry("eval.studies.out_of_core", "preparing a checkpoint larger than memory"),
    "plan_check": Entry("eval.studies.plan_check", "planned against measured peak memory"),
    "split_training": Entry("eval.studies.split_training", "training from each kind of split"),
    "image": Entry("eval.tasks.image", "pre-train the small ViT of the image task"),
    "hostile": Entry("eval.robustness.hostile", "damaged and hostile checkpoints"),
    "kills": Entry("eval.robustness.kills", "runs that are killed and resumed"),
    "long_run": Entry("eval.robustness.long_run", "memory and step time over thousands of steps"),
    "mutation": Entry("eval.robustness.mutation", "faults in a module that its tests miss"),
    "report": Entry("eval.report.report", "write eval/REPORT.md and eval/page/ from the rows"),
    "readme_table": Entry("eval.report.readme_table", "write the README's tables from the rows"),
}


def main(arguments: list[str]) -> None:
    """Run the study that the first argument names, or list all studies.

    The modules are imported here only: each needs other packages, and some take seconds.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        Console().print(listing())
        return
    name, *options = arguments
    if name not in STUDIES:
        Console(stderr=True).print(f"[bold red]Error:[/] There is no study {name!r}.", listing())
        raise SystemExit(2)
    from qrefta.cli import guarded

    module = import_module(STUDIES[name].module)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(
        help=unwrapped(inspect.getdoc(module) or ""),
        context_settings={"max_content_width": 100},
    )(module.run)
    guarded(lambda: app(options, prog_name=f"python -m eval {name}"))


def listing() -> Table:
    """Names and lines of all studies."""
    table = Table("name", "measures", title="python -m eval NAME [--help]", title_justify="left")
    for name, entry in STUDIES.items():
        table.add_row(name, entry.line)
    return table


def unwrapped(text: str) -> str:
    """A docstring whose lines click leaves as they are."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))


if __name__ == "__main__":
    main(sys.argv[1:])
