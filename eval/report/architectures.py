"""The table of architectures in docs/, from the rows of `eval.studies.coverage`."""

import re
from collections import Counter
from typing import Any

RESULTS = {"works": "work", "refused": "refused", "fails": "fail", "not built": "not built"}
CHECKS = {  # of `eval.tasks.checks`, as the table calls them
    "16 bits": "prepare",
    "training": "training step",
    "reload": "reload",
    "out of core": "prepare_checkpoint",
    "merge to a folder": "merge to a folder",
    "LoRA": "LoRA",
    "merge in place": "merge in place",
}


def architectures_table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: how many architectures work, and a line for each, by its last row."""
    last = {row["type"]: row for row in rows if "type" in row}
    counts = Counter(row["result"] for row in last.values())
    listed = ", ".join(f"{counts[name]} {text}" for name, text in RESULTS.items() if counts[name])
    lines = [
        f"{len(last)} architectures: {listed}.",
        "",
        "| model type | class | result | stays in 16 bits | notes |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(last):
        row = last[name]
        prepared = any(outcome == "works" for outcome in row.get("checks", {}).values())
        kept = f"{row['share_16_bit']:.0%}" if prepared else ""
        lines.append(
            f"| {name} | `{row['class']}` | {row['result']} | {kept} | {'; '.join(_notes(row))} |"
        )
    return "\n".join(lines)


def _notes(row: dict[str, Any]) -> list[str]:
    """Refusals and errors of a row, each words once, and the layers that stay in 16 bits."""
    found: dict[str, list[str]] = {}
    for name, outcome in row.get("checks", {}).items():
        if outcome != "works":
            found.setdefault(_words(outcome.partition(": ")[2]), []).append(CHECKS[name])
    notes = [
        words if len(names) == len(CHECKS) else f"{', '.join(names)}: {words}"
        for words, names in found.items()
    ]
    if "error" in row:
        notes.append(_words(row["error"]))
    layers = [layer["role"].rpartition("*.")[2] for layer in row.get("layers_16_bit", [])]
    if layers and row["share_16_bit"] >= 0.01:
        notes.append(f"16 bits: {', '.join(f'`{layer}`' for layer in layers[:6])}")
    return notes


def _words(message: str) -> str:
    """The first sentence of an error, without its class, in a form that fits in a cell."""
    text = " ".join(re.sub(r"^\w+: ", "", message).replace("|", "/").split())
    first = re.split(r"(?<=[a-z)])[.;] ", text)[0].rstrip(".")
    return first.replace("<", "&lt;")[:160]
