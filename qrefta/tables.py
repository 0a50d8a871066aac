"""Tables that the command line prints: of a prepared model, training runs, memory, scores."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from qrefta.measure.compare import TextComparison
    from qrefta.memory.plan import Plan
    from qrefta.train.run import FinetuneResult


def report_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `quant_report` as a table, with a line for the whole model."""
    prefix = _common_prefix([row["stack"] for row in rows])
    where = f" in {prefix.removesuffix('.')}" if prefix else ""
    table = new_table(f"Squared quantization error{where}: whole weight W, residual Wr")
    has_outputs = rows[0]["output_ratio"] is not None
    if has_outputs:
        table.caption = "output: error of the layers' outputs, where 1 is W rounded plainly"
        table.caption_justify = "left"
    columns = ["stack", "shape", "R", "W-Q(W)", "Wr-Q(Wr)", "ratio"]
    if has_outputs:
        columns.append("output")
    for name in [*columns, "bits"]:
        table.add_column(name, justify="left" if name == "stack" else "right", overflow="fold")
    for row in rows:
        table.add_row(*_report_cells(row, prefix, has_outputs))
    table.add_section()
    table.add_row(*_total_cells(rows, has_outputs))
    return table


def _report_cells(row: Mapping[str, Any], prefix: str, has_outputs: bool) -> list[str]:
    out_features, in_features = row["shape"]
    cells = [
        row["stack"].removeprefix(prefix),
        f"{row['layers']}x{out_features}x{in_features}",
        str(row["rank"]),
        _number_text(row["baseline_error"]),
        _number_text(row["residual_error"]),
        f"{row['ratio']:.3f}",
    ]
    if has_outputs:
        cells.append(f"{row['output_ratio']:.3f}")
    return [*cells, f"{row['bits_per_weight']:.2f}"]


def _total_cells(rows: Sequence[Mapping[str, Any]], has_outputs: bool) -> list[str]:
    baseline = sum(row["baseline_error"] for row in rows)
    residual = sum(row["residual_error"] for row in rows)
    weights = sum(row["layers"] * row["shape"][0] * row["shape"][1] for row in rows)
    bits = 8 * sum(row["bytes"] for row in rows) / weights
    ratio = residual / baseline if baseline else 1.0
    errors = [_number_text(baseline), _number_text(residual)]
    cells = ["all", _count_text(weights), "", *errors, f"{ratio:.3f}"]
    if has_outputs:
        cells.append("")
    return [*cells, f"{bits:.2f}"]


def settings_table(settings: Mapping[str, Any]) -> Table:
    """Settings of a prepared model, one a line."""
    table = new_table("Settings")
    table.add_column("setting")
    table.add_column("value", overflow="fold")
    for name, value in settings.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        table.add_row(name, "" if shown is None else str(shown))
    return table


def results_table(results: Mapping[str, "FinetuneResult"]) -> Table:
    """Training runs side by side: rewards, accuracy or perplexity, and loss on the test rows."""
    table = new_table("On the test rows, before and after training")
    measure = next((_scores(result)[0] for result in results.values()), "")
    for name in (
        "method",
        "trainable",
        f"{measure} before",
        "after",
        "loss before",
        "after",
        "steps",
        "seconds",
    ):
        longest = max(len(word) for word in name.split())  # rich would cut words in narrow windows
        table.add_column(name, justify="left" if name == "method" else "right", min_width=longest)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.trained_parameters:,}",
            *_scores(result)[1:],
            f"{result.test_loss_before:.3f}",
            f"{result.test_loss:.3f}",
            str(result.steps),
            f"{result.train_s:.0f}",
        )
    return table


def _scores(result: "FinetuneResult") -> tuple[str, str, str]:
    """The measure of a run's task, before and after training."""
    if result.reward_before is not None and result.reward_after is not None:
        return "reward", f"{result.reward_before:.3f}", f"{result.reward_after:.3f}"
    if result.accuracy_after is not None:
        return "accuracy", _percent(result.accuracy_before), _percent(result.accuracy_after)
    losses = (result.test_loss_before, result.test_loss)
    before, after = (f"{exp(loss):.4g}" if loss < 100 else "over 1e43" for loss in losses)
    return "perplexity", before, after


def plan_table(plan: "Plan") -> Table:
    """The parts of a plan."""
    table = new_table("Memory of a training step")
    table.add_column("part")
    table.add_column("size", justify="right")
    parts = {
        "linear layers": plan.linears_bytes,
        "rest": plan.rest_bytes,
        "factors": plan.factors_bytes,
        "optimizer": plan.optimizer_bytes,
        "activations": plan.activations_bytes,
        "temporary": plan.temporary_bytes,
    }
    for name, nbytes in parts.items():
        table.add_row(name, size_text(nbytes))
    table.add_section()
    table.add_row("peak", size_text(plan.total_bytes))
    return table


def scores_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Scores of lm-evaluation-harness: metrics by task."""
    table = new_table("lm-evaluation-harness")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for task, metrics in scores.items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{variant}")
            shown = f"{error:.2g}" if isinstance(error, float) else ""
            table.add_row(task, metric, f"{value:.4g}", shown)
    return table


def comparison_table(comparisons: Sequence["TextComparison"]) -> Table:
    """A model on texts, next to its reference if there is one: one column a text."""
    first = comparisons[0]
    against = "" if first.reference is None else f" compared with {first.reference}"
    table = new_table(f"{first.model}{against}, windows of {first.window} tokens")
    table.add_column("", overflow="fold")
    for comparison in comparisons:
        table.add_column(comparison.text, justify="right", overflow="fold")
    for name in first.to_text():
        table.add_row(name, *(comparison.to_text()[name] for comparison in comparisons))
    return table


def files_table(files: Sequence[tuple[str, str]]) -> Table:
    """Verified files, one a line."""
    table = new_table("Verified")
    table.add_column("file", overflow="fold")
    table.add_column("checked", overflow="fold")
    for name, checked in files:
        table.add_row(name, checked)
    return table


def new_table(title: str) -> Table:
    """An empty table in the style of all tables that qrefta prints."""
    # the report's columns fit in 80 characters
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def size_text(nbytes: int) -> str:
    """Bytes as people read them: 3.30 GB, 12.5 MB, 0.1 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _count_text(count: int) -> str:
    """A count as people read it: 1.10 B, 106.2 M, 36,864."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _number_text(number: float) -> str:
    """Four digits, and no exponent that takes more room than the digits: 0.01234, 5542, 13,240."""
    return f"{number:,.0f}" if 1e4 <= number < 1e7 else f"{number:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _common_prefix(names: list[str]) -> str:
    """The module path that all names start with, with its dot, or nothing."""
    owners = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*owners):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) + "." if shared else ""
