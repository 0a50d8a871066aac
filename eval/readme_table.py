"""python -m eval.readme_table: put the quickstart's committed rows into the README's table."""

from pathlib import Path

from eval.rows import read

ROWS = Path(__file__).parent / "rows" / "quickstart.jsonl"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- table: eval/rows/quickstart.jsonl -->", "<!-- end of table -->"


def table(rows: list[dict]) -> str:
    """The measured table in Markdown, from the rows of one quickstart."""
    training = [row for row in rows if row["kind"] == "training"]
    stacks = [row for row in rows if row["kind"] == "stack"]
    files = next(row for row in rows if row["kind"] == "files")
    baseline, residual = (sum(row[key] for row in stacks) for key in ("baseline_error", "residual_error"))
    lines = [
        f"Measured by `scripts/quickstart` on {training[0]['device']}, {training[0]['threads']} threads, "
        f"{training[0]['steps']} steps, {training[0]['n']} test rows, one seed:",
        "",
        "| trained | linears of the blocks | trained numbers | accuracy before | accuracy after (± standard error) |",
        "|---|---|---|---|---|",
    ]
    for row in training:
        packed = files["linears_bytes"] if row["method"] == "qrefta" else files["linears_16_bit_bytes"]
        lines.append(
            f"| {row['method']} | {packed / 1e6:.1f} MB | {row['trained_parameters']:,} | {row['accuracy_before']:.1%} "
            f"| {row['accuracy_after']:.1%} ± {row['standard_error']:.1%} |"
        )
    bits = 8 * files["linears_bytes"] / (files["linears_16_bit_bytes"] / 2)
    rank = stacks[0]["rank"]
    return "\n".join(
        [
            *lines,
            "",
            f"At R = {rank} and {bits:.2f} bits a weight, factors included, the squared quantization error of all "
            f"linears is {residual / baseline:.3f} of that of quantizing whole weights. The reloaded model's logits "
            f"differ by {files['reload_difference']:.2g}, the merged bf16 model's by {files['merge_difference']:.2g} "
            f"(largest logit {files['largest_logit']:.1f}).",
        ]
    )


def insert(readme: str, rows: list[dict]) -> str:
    """The README with its table made anew."""
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(insert(README.read_text(encoding="utf-8"), read(ROWS)), encoding="utf-8")
