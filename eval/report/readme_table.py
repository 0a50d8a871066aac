"""python -m eval.report.readme_table: fill the tables of the README and of docs/ from committed
rows.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.report.architectures import architectures_table
from eval.report.comparison import by_task, comparison
from eval.report.kept import short_table
from eval.report.pages import markdown_table
from eval.report.scores import score_table, scores
from eval.rows import read

ROWS = Path(__file__).parents[1] / "rows"
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TASKS = ("sst2",)
PLACE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", flags=re.DOTALL)


def quickstart_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table from the rows of one quickstart."""
    training = [row for row in rows if row["kind"] == "training"]
    files = next(row for row in rows if row["kind"] == "files")
    lines = [
        "| method | linear layers of the blocks | trainable parameters | accuracy before | "
        "accuracy after (± standard error) |",
        "|---|---|---|---|---|",
    ]
    for row in training:
        packed = (
            files["linears_bytes"] if row["method"] == "qrefta" else files["linears_16_bit_bytes"]
        )
        lines.append(
            f"| {row['method']} | {packed / 1e6:.1f} MB | {row['trained_parameters']:,} | "
            f"{row['accuracy_before']:.1%} "
            f"| {row['accuracy_after']:.1%} ± {row['standard_error']:.1%} |"
        )
    return "\n".join([*lines, "", _caption(rows, training[0], files)])


def quickstart_chat_table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the quickstart with a language model: losses and answers."""
    kinds = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("base", "training", "answer", "run")
    }
    ours, theirs = (
        next(row for row in kinds["base"] if row["base"] == base)
        for base in ("qrefta", "bitsandbytes NF4")
    )
    (run,) = kinds["run"]
    lines = [
        "| method | trainable parameters | loss on test answers before | after |",
        "|---|---|---|---|",
    ]
    for row in kinds["training"]:
        lines.append(
            f"| {row['method']} | {row['trained_parameters']:,} | {row['test_loss_before']:.3f} | "
            f"{row['test_loss']:.3f} |"
        )
    lines += ["", "| question | docstring | before | after |", "|---|---|---|---|"]
    for row in kinds["answer"]:
        cells = (
            " ".join(row[name].replace("|", "\\|").split())
            for name in ("question", "docstring", "before", "after")
        )
        lines.append(f"| {' | '.join(cells)} |")
    caption = (
        f"{kinds['training'][0]['steps']} steps, one seed ({run['device']}, {run['threads']} "
        f"threads). Before training the KL divergence to the dense model is "
        f"{ours['kl_mean']:.3f}, with bitsandbytes NF4 {theirs['kl_mean']:.3f}. The whole run "
        f"takes {run['total_s']:.0f} s and {run['peak_bytes'] / 1e9:.1f} GB of memory. The files "
        f"have {run['prepared_bytes'] / 1e6:.0f} MB of {run['dense_bytes'] / 1e6:.0f}."
    )
    return "\n".join([*lines, "", caption])


def cost_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table from one run of `eval.studies.cost` without and one with checkpointing.

    Raises:
        ValueError: if there are rows of other runs.
    """
    runs = {(row["setting"], row["device"], row["threads"], tuple(row["batch"])) for row in rows}
    methods = {(row["method"], row["checkpointing"]) for row in rows}
    if len(runs) != 1 or len(methods) != len(rows):
        raise ValueError(
            f"The rows come from several settings, devices or runs: {sorted(runs)}; keep one of "
            f"them."
        )
    plain, checkpointed = (
        {row["method"]: row for row in rows if row["checkpointing"] == on} for on in (False, True)
    )
    lines = [
        "| method | trainable parameters | step | / floor | / QLoRA r=16 | peak memory | / floor "
        "| / QLoRA r=16 "
        "| checkpointing: step | peak memory | / floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in plain.items():
        other = checkpointed.get(method)
        with_checkpointing = (
            "| | | |"
            if other is None
            else f"| {other['step_s']:.2f} s | {other['peak_bytes'] / 1e6:.0f} MB "
            f"| {other['peak_of_floor']:.2f} |"
        )
        lines.append(
            f"| {method} | {row['trained_parameters']:,} | {row['step_s']:.2f} s | "
            f"{row['of_floor']:.2f} "
            f"| {row['of_qlora']:.2f} | {row['peak_bytes'] / 1e6:.0f} MB | "
            f"{row['peak_of_floor']:.2f} "
            f"| {row['peak_of_qlora']:.2f} {with_checkpointing}"
        )
    first = next(iter(plain.values()))
    sequences, length = first["batch"]
    caption = (
        f"{sequences} x {length} tokens, {first['dtype']}, medians of {first['n']} alternated "
        f"steps "
        f"({first['device']}, {first['threads']} threads)."
    )
    if len({row["commit"] for row in plain.values()}) > 1:
        caption += " Several runs; each ratio uses the floor and QLoRA of the same run."
    return "\n".join([*lines, "", caption])


def whole_step_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of `eval.studies.whole_step`, each dtype and kind of rows from one run."""
    lines = [
        "| rows | dtype | method | trainable parameters | tokens a second | / QLoRA r=16 "
        "| peak memory | / QLoRA r=16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if "kind" not in row]
    for row in rows:
        lines.append(
            f"| {row['batch_size']} of {row['rows']} | {row['dtype']} | {row['method']} | "
            f"{row['trained_parameters']:,} | {row['tokens_per_s']:.0f} | "
            f"{row['tokens_per_s_of_qlora']:.2f} | "
            f"{row['peak_bytes'] / 1e6:.0f} MB | {row['peak_bytes_of_qlora']:.2f} |"
        )
    first = rows[0]
    checkpointing = "with" if first["checkpointing"] else "without"
    steps = sorted({row["steps"] for row in rows})
    caption = (
        f"{first['model']}, {checkpointing} gradient checkpointing, {steps[0]} to {steps[-1]} "
        f"alternated steps of each method ({first['device']}, {first['threads']} threads). Each "
        f"kind of rows and dtype is one run."
    )
    return "\n".join([*lines, "", caption])


def startup_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table from one run of `eval.studies.startup`."""
    lines = [
        "| from the start of the process to its first step | median | longest |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['first_step_s']:.1f} s | {row['longest_s']:.1f} s |"
        for row in rows
    ]
    first = rows[0]
    caption = (
        f"{first['model']}, {first['batch_size']} rows a step, {first['repetitions']} alternated "
        f"starts of each ({first['device']}, {first['threads']} threads)."
    )
    return "\n".join([*lines, "", caption])


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of `eval.studies.accuracy`, one per study of the README's tasks."""
    parts = []
    for study, methods in scores([row for row in rows if row["task"] in TASKS]).items():
        first = next(iter(methods.values()))
        parts += [
            f"{study.task}: {study.model}, {study.steps} steps of {study.batch_size} rows, "
            f"{first.test_rows:,} to test",
            markdown_table(score_table(methods)),
        ]
    return "\n\n".join(parts)


def coverage_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table from one run of `eval.studies.coverage`, one line per published model."""
    rows = [row for row in rows if "tool" in row]
    lines = [
        "| model | weights | bitsandbytes: in 4 bits | size | qrefta: in 4 bits | size |",
        "|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        theirs, ours = (
            next(row for row in rows if (row["model"], row["tool"]) == (model, tool))
            for tool in ("bitsandbytes", "qrefta")
        )
        lines.append(
            f"| {model} | {ours['weights'] / 1e9:.1f} billion | {theirs['share']:.1%} | "
            f"{theirs['bytes'] / 1e9:.1f} GB "
            f"| {ours['share']:.1%} | {ours['bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def kept_table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: KL divergence of 4-bit bases of a language model, with the caption."""
    table, caption = short_table(rows)
    return f"{markdown_table(table)}\n\n{caption}"


def insert(page: str) -> str:
    """A page with its tables filled from the committed rows."""
    return PLACE.sub(lambda place: _block(place[1]), page)


def _block(name: str) -> str:
    make, files = TABLES[name]
    body = make(*(read(ROWS / f"{file}.jsonl") for file in files))
    return f"<!-- table: {name} -->\n{body}\n<!-- end of table -->"


def _caption(rows: list[dict[str, Any]], run: dict[str, Any], files: dict[str, Any]) -> str:
    stacks = [row for row in rows if row["kind"] == "stack"]
    baseline, residual = (
        sum(row[key] for row in stacks) for key in ("baseline_error", "residual_error")
    )
    bits = 8 * files["linears_bytes"] / (files["linears_16_bit_bytes"] / 2)
    return (
        f"R = {stacks[0]['rank']}, {run['steps']} steps, {run['n']} test rows, one seed "
        f"({run['device']}, "
        f"{run['threads']} threads). {bits:.2f} bits per weight, factors included; squared "
        f"quantization error "
        f"{residual / baseline:.3f} times the error of quantizing whole weights. Largest "
        f"difference of logits: reloaded "
        f"{files['reload_difference']:.2g}, merged to bf16 {files['merge_difference']:.2g} (of "
        f"{files['largest_logit']:.1f})."
    )


# By the name in a page's mark: the function, and the rows files that it reads.
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "by_task": (by_task, ("accuracy",)),
    "comparison": (comparison, ("accuracy",)),
    "kept": (kept_table, ("kld",)),
    "quickstart": (quickstart_table, ("quickstart",)),
    "quickstart_chat": (quickstart_chat_table, ("quickstart_chat",)),
    "quickstart_sst2": (quickstart_table, ("quickstart_sst2",)),
    "cost": (cost_table, ("cost",)),
    "whole_step": (whole_step_table, ("whole_step",)),
    "startup": (startup_table, ("startup",)),
    "accuracy": (accuracy_table, ("accuracy",)),
    "architectures": (architectures_table, ("coverage",)),
    "coverage": (coverage_table, ("coverage",)),
}


def run() -> None:
    """Fill the tables of all pages."""
    for file in PAGES:
        file.write_text(insert(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run()
