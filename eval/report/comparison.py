"""The README's table: qrefta, QLoRA and PiSSA on the same model, data and steps."""

from eval.report.findings import Row, Table, number, pick
from eval.report.scores import Score, difference, scores, shown

TASK = "sst2"
RANK = 48  # 8 for each of MiniLM's six layers
BASELINE = "qlora r=8"
REFTA: Row = {"method": "refta", "rank": RANK, "transform": "lsm3"}

# Name in the table, method in accuracy.jsonl, and the fields of the split in quant_error.jsonl.
# QLoRA quantizes whole weights: its base is the split of rank 0, the unit of both error columns.
# CRAFT's error was measured at other ranks than its score, so its error columns stay empty.
METHODS: list[tuple[str, str, Row | None]] = [
    ("QLoRA, r = 8", BASELINE, {"method": "refta", "rank": 0}),
    ("PiSSA, r = 8, 4-bit residual", "qpissa r=8", {"method": "pissa", "rank": RANK}),
    ("qrefta, R = 48, `refine=0`", "refta R=48 refine=0", REFTA | {"start": "one shot"}),
    ("qrefta, R = 48 (default refinement)", "refta R=48", REFTA | {"start": "refined"}),
    ("qrefta, R = 48, calibrated", "refta R=48 calibrated", REFTA | {"start": "calibrated"}),
    ("qrefta, CRAFT 6, 100, 100", "craft ranks=6/100/100", None),
]

HEADER = [
    "method",
    "trainable parameters",
    "peak memory",
    "time (CPU)",
    "weight error of the base",
    "output error of the base",
    "accuracy",
    "compared with QLoRA",
]


def comparison_table(accuracy: list[Row], quant_error: list[Row]) -> tuple[Table, str]:
    """The table and its caption.

    Args:
        accuracy: rows of `eval.studies.accuracy`.
        quant_error: rows of `eval.studies.quant_error`.
    """
    compared = {method for _, method, _ in METHODS}
    study, methods = next(
        (study, methods)
        for study, methods in scores(pick(accuracy, task=TASK)).items()
        if compared <= methods.keys()
    )
    bases = pick(quant_error, kind="model", quant_type="nf4")
    baseline = methods[BASELINE]
    lines = []
    for name, method, fields in METHODS:
        base = None if fields is None else pick(bases, **fields)[-1]
        lines.append(_line(name, methods[method], base, baseline))
    caption = (
        f"{study.model} on SST-2: {study.train_rows:,} training rows, {study.steps} steps of "
        f"{study.batch_size} rows, {baseline.test_rows:,} test rows, {len(baseline.values)} seeds, "
        "mean ± standard error. Every method has the same search for its learning rate. "
        "Trainable parameters exclude the head. Errors are squared and relative to quantizing the "
        "whole weight to NF4."
    )
    return Table(HEADER, lines), caption


def _line(name: str, score: Score, base: Row | None, baseline: Score) -> list[str]:
    """One line of the table."""
    pair = difference(score, baseline, None)
    compared = "-" if pair is None or score is baseline else pair.amount
    peak_bytes = score.peak_bytes
    return [
        name,
        f"{score.adapter:,}",
        "-" if peak_bytes is None else f"{peak_bytes / 1e6:.0f} MB",
        f"{score.cpu_s:.0f} s",
        number(base and base["ratio"]),
        number(base and base["output_ratio"]),
        shown(score),
        compared,
    ]
