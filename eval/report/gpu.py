"""The sections of the report about GPUs: tables of the rows of `eval.studies.gpu`."""

from eval.report.findings import Row, Table, distinct, number, pick
from eval.report.pages import Section

OURS = "windows R=64"
KEY = ("kind", "setting", "layers", "method", "checkpointing", "batch", "calibrated")


def sections(rows: list[Row]) -> list[Section]:
    """A section for each GPU; of measurements that were repeated the last counts."""
    found = []
    for device in distinct(rows, "device"):
        latest = {str([row.get(name) for name in KEY]): row for row in pick(rows, device=device)}
        found.append(section(device, list(latest.values())))
    return found


def section(device: str, rows: list[Row]) -> Section:
    """The tables of one GPU."""
    first = rows[0]
    text = (
        f"{device}, driver {first['driver']}, CUDA {first['cuda']}; random weights. Steps are "
        "compared with the frozen 4-bit model of bitsandbytes and with PEFT's QLoRA, r = 16, in "
        "the same run. Where time or memory was short, a model has fewer layers than its setting."
    )
    for row in pick(rows, kind="tests"):
        text += f" {row['passed']} tests passed on the GPU, {row['skipped']} were skipped."
    tables = {
        "Training steps on a GPU": steps_table(pick(rows, kind="step")),
        "Preparing on a GPU": preparing_table(pick(rows, kind="prepare")),
        "Generation on a GPU": generation_table(pick(rows, kind="decoding")),
    }
    return Section(
        title(device, rows), text, [], {name: one for name, one in tables.items() if one.rows}
    )


def title(device: str, rows: list[Row]) -> str:
    """The last step of the default method that was timed next to QLoRA's."""
    timed = [row for row in pick(rows, kind="step", method=OURS) if "of_qlora" in row]
    if not timed:
        return f"Measured on one {device}"
    row = timed[-1]
    return (
        f"On one {device} a step with {OURS} takes {row['of_qlora']:.2f} times as long as QLoRA's, "
        f"with {row['peak_of_qlora']:.2f} times the memory"
    )


def steps_table(rows: list[Row]) -> Table:
    """Time and peak memory of training steps; large models have no time."""
    lines = [
        [
            row["setting"],
            str(row["layers"]),
            row["method"],
            "yes" if row["checkpointing"] else "no",
            number(row["step_s"] * 1e3, ".0f") + " ms" if "step_s" in row else "-",
            number(row.get("of_bitsandbytes"), ".2f"),
            number(row.get("of_qlora"), ".2f"),
            _gigabytes(row),
        ]
        for row in rows
    ]
    header = ["model", "layers", "method", "checkpointing", "step"]
    return Table([*header, "/ bitsandbytes", "/ QLoRA r=16", "peak memory"], lines)


def preparing_table(rows: list[Row]) -> Table:
    """Time and peak memory of `prepare`."""
    lines = [
        [
            row["setting"],
            str(row["layers"]),
            row["method"],
            "yes" if row["calibrated"] else "no",
            f"{row['prepare_s']:.1f} s",
            _gigabytes(row),
        ]
        for row in rows
    ]
    return Table(["model", "layers", "method", "calibrated", "time", "peak memory"], lines)


def generation_table(rows: list[Row]) -> Table:
    """Tokens per second."""
    lines = [
        [
            row["setting"],
            str(row["layers"]),
            row["method"],
            str(row["batch"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_bitsandbytes']:.2f}",
        ]
        for row in rows
    ]
    return Table(["model", "layers", "method", "batch", "tokens/s", "/ bitsandbytes"], lines)


def _gigabytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e9:.2f} GB"
