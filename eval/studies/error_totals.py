"""Errors of whole models: sums over the rows of their stacks."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from eval.studies.stack_errors import Cell

SUMMED = (
    "baseline_error",
    "residual_error",
    "nuclear_baseline",
    "nuclear_error",
    "output_baseline",
    "output_error",
)


def whole_model(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the whole model: sums over its stacks by all other fields of a cell.

    R = 0 has one row per format, the baseline.
    """
    found: dict[Cell, dict[str, dict[str, Any]]] = {}
    names: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "stack":
            cell = Cell(*(row[field] for field in Cell._fields))
            found.setdefault(cell._replace(stack="all"), {})[cell.stack] = row
            names.setdefault(cell.model, set()).add(cell.stack)
    for cell, stacks in found.items():
        if set(stacks) == names[cell.model]:
            yield {"kind": "model"} | cell._asdict() | totals(list(stacks.values()))


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of errors over rows of stacks, and their ratios."""
    nuclear = all(row["nuclear_error"] is not None for row in rows)
    total = {
        name: sum(row[name] for row in rows)
        for name in SUMMED
        if nuclear or name != "nuclear_error"
    }
    numel = [torch.Size(row["shape"]).numel() for row in rows]
    bits = sum(row["bits_per_weight"] * size for row, size in zip(rows, numel, strict=True))
    return total | {
        "ratio": total["residual_error"] / total["baseline_error"],
        "nuclear_reduction": 1 - total["nuclear_error"] / total["nuclear_baseline"]
        if nuclear
        else None,
        "output_ratio": total["output_error"] / total["output_baseline"],
        "bits_per_weight": bits / sum(numel),
    }


def rising(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Descriptions of the refta series whose weight error rises anywhere as R grows."""
    series: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if row["kind"] in ("stack", "model") and row["method"] == "refta":
            names = ("model", "stack", "quant_type", "transform", "start")
            series.setdefault(tuple(row[name] for name in names), {})[row["rank"]] = row["ratio"]
    for name, errors in series.items():
        ordered = [error for _, error in sorted(errors.items())]
        if any(later > earlier for earlier, later in pairwise(ordered)):
            yield f"{' '.join(name)}: {', '.join(f'{error:.4f}' for error in ordered)}"
