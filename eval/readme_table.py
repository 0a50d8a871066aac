"""python -m eval.readme_table: put the quickstart's committed rows into the README's tables."""

import re
from pathlib import Path
from typing import Any

from eval.rows import read

ROWS = Path(__file__).parent / "rows"
README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(r"<!-- table: (\w+)\.jsonl -->\n.*?<!-- end of table -->", flags=re.DOTALL)


def table(rows: list[dict[str, Any]]) -> str:
    """The measured table in Markdown, from the rows of one quickstart."""
    training = [row for row in rows if row["kind"] == "training"]
    files = next(row for row in rows if row["kind"] == "files")
    lines = [
        "| trained | linears of the blocks | trained numbers | accuracy before | accuracy after (± standard error) |",
        "|---|---|---|---|---|",
    ]
    for row in training:
        packed = files["linears_bytes"] if row["method"] == "qrefta" else files["linears_16_bit_bytes"]
        lines.append(
            f"| {row['method']} | {packed / 1e6:.1f} MB | {row['trained_parameters']:,} | {row['accuracy_before']:.1%} "
            f"| {row['accuracy_after']:.1%} ± {row['standard_error']:.1%} |"
        )
    return "\n".join([*lines, "", _caption(rows, training[0], files)])


def insert(readme: str) -> str:
    """The README with its tables made anew from the rows that they name."""
    return PLACE.sub(lambda place: _block(place[1]), readme)


def _block(name: str) -> str:
    body = table(read(ROWS / f"{name}.jsonl"))
    return f"<!-- table: {name}.jsonl -->\n{body}\n<!-- end of table -->"


def _caption(rows: list[dict[str, Any]], run: dict[str, Any], files: dict[str, Any]) -> str:
    stacks = [row for row in rows if row["kind"] == "stack"]
    baseline, residual = (sum(row[key] for row in stacks) for key in ("baseline_error", "residual_error"))
    bits = 8 * files["linears_bytes"] / (files["linears_16_bit_bytes"] / 2)
    return (
        f"R = {stacks[0]['rank']}, {run['steps']} steps, {run['n']} test rows, one seed ({run['device']}, "
        f"{run['threads']} threads). {bits:.2f} bits a weight, factors included; squared quantization error "
        f"{residual / baseline:.3f} of that of quantizing whole weights. Largest difference of logits: reloaded "
        f"{files['reload_difference']:.2g}, merged to bf16 {files['merge_difference']:.2g} (of "
        f"{files['largest_logit']:.1f})."
    )


if __name__ == "__main__":
    README.write_text(insert(README.read_text(encoding="utf-8")), encoding="utf-8")
