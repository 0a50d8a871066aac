"""The paper's claims and our own beside what the rows say: each holds, holds in part, does not, or cannot be told."""

from typing import NamedTuple

from eval.report.findings import (
    FORMATS,
    NAMES,
    PAPER,
    TIE,
    TIMING,
    Duel,
    Row,
    distinct,
    duel,
    duel_for_bytes,
    monotone,
    pick,
    transforms_duel,
)
from eval.report.scores import CONFIDENCE, Difference, Score, Study, differences, scores

HOLDS, IN_PART, FAILS, UNTOLD = "holds", "holds in part", "does not hold", "cannot be told here"
NAMED = 4  # exceptions that are named
CELL = ("model", "stack", "quant_type", "transform", "rank")

THRESHOLDS = (
    f"Errors within {TIE:.0%} of each other count as level, step times within {TIMING:.0%} as equal. A difference of "
    f"scores is paired over seeds and counts where its {CONFIDENCE:.0%} interval (Student's t) leaves out zero; where "
    "half the interval is as wide as what the rival gains over the head alone, the task cannot tell (untold). A claim "
    "holds where no cell speaks against it, does not hold where none speaks for it, and holds in part between. That a "
    "method is level says that these seeds show no loss, not that there is none."
)


class Verdict(NamedTuple):
    """One line of the table.

    Attributes:
        measured: lines of numbers from rows.
        word: HOLDS, IN_PART, FAILS or UNTOLD.
    """

    claim: str
    measured: list[str]
    word: str
    why: str


def verdicts(files: dict[str, list[Row]]) -> list[Verdict]:
    """All of them, in the order of the paper's claims, then ours, then the rivals."""
    errors, cost = files.get("quant_error", []), files.get("cost", [])
    studies = scores(files.get("accuracy", []))
    stacks, models = pick(errors, kind="stack"), pick(errors, kind="model")
    return [
        below_baseline(stacks),
        falls_with_rank(stacks),
        fewer_numbers(studies),
        *(
            beside_lora(studies, *pair)
            for method in ("refta", "craft", "tera")
            for pair in ((f"{method} bits=16", "lora"), (method, "qlora"))
        ),
        one_knob(models),
        no_rebuilding(cost),
        transform_errors(models),
        transform_scores(studies),
        refinement_errors(stacks),
        calibration_errors(stacks),
        starts_scores(studies),
        smaller_blocks(models),
        *rivals(models),
    ]


def judge(for_it: int, against: int) -> str:
    """The word for so many cells on either side; cells that are on neither are not counted."""
    if for_it + against == 0:
        return UNTOLD
    return HOLDS if against == 0 else FAILS if for_it == 0 else IN_PART


def below_baseline(stacks: list[Row]) -> Verdict:
    """The paper's headline, of one-shot splits, for every stack."""
    splits = [row for row in pick(stacks, method="refta", start="one shot") if row["rank"]]
    lines, below = [], 0
    for name in distinct(splits, "quant_type"):
        ratios = [row["ratio"] for row in pick(splits, quant_type=name)]
        below += sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{FORMATS[name]}: below in {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} cells, "
            f"{min(ratios):.3f} to {max(ratios):.3f} times"
        )
    return Verdict(
        "The residual quantizes with less error than the whole weight: ||W_res - Q(W_res)||^2 < ||W - Q(W)||^2",
        lines or ["not measured"],
        judge(below, len(splits) - below),
        "Every stack, R and transform, in one shot: the principal part takes the largest singular values out before "
        "4 bits are spent.",
    )


def falls_with_rank(stacks: list[Row]) -> Verdict:
    """Strictly, for every stack, format, transform and start."""
    count, exceptions = monotone(stacks)
    good, bad = count - len(exceptions), len(exceptions)
    return Verdict(
        "The error falls as R grows",
        [f"{good} of {count} series fall at every step of R", *exception_lines(exceptions)],
        judge(good, bad),
        "A series is one stack, format, transform and start over all its R.",
    )


def exception_lines(exceptions: dict[str, list[str]]) -> list[str]:
    """NAMED of the series at most, and how many more there are."""
    lines = [f"{name}: {'; '.join(steps)}" for name, steps in list(exceptions.items())[:NAMED]]
    return [*lines, f"and {len(exceptions) - NAMED} more"] if len(exceptions) > NAMED else lines


def fewer_numbers(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Counted adapter parameters, ReFTA's over LoRA's."""
    found = {
        (pair.ours.method, pair.theirs.method, one.model): pair.ours.adapter / pair.theirs.adapter
        for one, methods in studies.items()
        for pair in differences(methods, "refta bits=16", "lora")
    }
    lines = [
        f"{ours} over {theirs} ({model}): {share:.2f}"
        for (ours, theirs, model), share in found.items()
    ]
    fewer = sum(share < 1 for share in found.values())
    return Verdict(
        "It trains a fraction of LoRA's numbers",
        lines or ["not measured"],
        judge(fewer, len(found) - fewer),
        "R (in + out) a stack against r (in + out) a layer: fewer only where R < r layers. In a shallow model that "
        "leaves few components for each layer.",
    )


def beside_lora(studies: dict[Study, dict[str, Score]], ours: str, theirs: str) -> Verdict:
    """Scores: level or better with fewer trained numbers; pairs with as many or more are shown and do not count."""
    pairs = {one: differences(methods, ours, theirs) for one, methods in studies.items()}
    shown = {
        one: [pair for pair in found if pair.ours.adapter <= pair.theirs.adapter]
        for one, found in pairs.items()
    }
    told = [pair for found in shown.values() for pair in found if pair.word != "untold"]
    fewer = [pair for pair in told if pair.ours.adapter < pair.theirs.adapter]
    good = sum(pair.word != "worse" for pair in fewer)
    equal = [pair for pair in told if pair.ours.adapter == pair.theirs.adapter]
    worse = sum(pair.word == "worse" for pair in equal)
    note = f"Of {len(equal)} pairs with equally many {worse} are worse. " if equal else ""
    bits = "16-bit weights" if "bits=16" in ours else "4-bit weights"
    name = NAMES[ours.split()[0]]
    return Verdict(
        f"{name}: {'QLoRA' if theirs == 'qlora' else 'LoRA'}'s score or better with fewer trained numbers ({bits})",
        score_lines(shown),
        judge(good, len(fewer) - good),
        f"Of {len(fewer)} pairs with fewer numbers that can be told {good} are level or better. {note}Pairs with more "
        "numbers are in the tasks' tables.",
    )


def score_lines(pairs: dict[Study, list[Difference]]) -> list[str]:
    """A line a pair, behind its task."""
    return [f"{one.task}: {pair}" for one, found in pairs.items() for pair in found] or [
        "not measured"
    ]


def one_knob(models: list[Row]) -> Verdict:
    """Errors of the whole model, where the one number R was all that changed."""
    count, exceptions = monotone(models)
    good, bad = count - len(exceptions), len(exceptions)
    return Verdict(
        "One number, R, sets the trade of size for error",
        [
            f"{good} of {count} series of the whole model fall at every step of R",
            *exception_lines(exceptions),
        ],
        judge(good, bad),
        "R goes to the largest tensor singular values of a stack, over all its layers; no layer has a rank to set. "
        "Each stack has the same R.",
    )


def no_rebuilding(cost: list[Row]) -> Verdict:
    """The form that makes a dense weight in every step, beside the layer that does not; time and peak memory."""
    ours, dense = pick(cost, method="qrefta R=64"), pick(cost, method="rebuilding R=64")
    match = ("setting", "device", "threads", "dtype", "checkpointing")
    lines, good, bad = [], 0, 0
    for row in dense:
        for own in pick(ours, **{key: row[key] for key in match}):
            time, peak = row["step_s"] / own["step_s"], row["peak_bytes"] / own["peak_bytes"]
            with_it = "with" if row["checkpointing"] else "without"
            lines.append(
                f"{row['setting']}, {with_it} checkpointing: rebuilding takes {time:.2f} times the time and {peak:.2f} "
                "times the memory"
            )
            good += time > 1 + TIMING and peak > 1
            bad += not (time > 1 + TIMING and peak > 1)
    return Verdict(
        "No dense weight is rebuilt in a step, and that pays",
        lines or ["not measured"],
        judge(good, bad),
        "R = 64 both ways; thin products take the place of A diag(u) B. Where R is near the width, rebuilding wins.",
    )


def from_duel(claim: str, found: Duel, why: str) -> Verdict:
    """The verdict of cells; level ones speak against a claim of being better."""
    return Verdict(claim, [str(found)], judge(found.wins, len(found.quotients) - found.wins), why)


def transform_errors(models: list[Row]) -> Verdict:
    """Errors of the whole model."""
    found = transforms_duel(models)
    cells = len(found.quotients)
    words = {
        HOLDS: f"{PAPER} beats identity everywhere.",
        IN_PART: f"identity is as good or better in {cells - found.wins} of {cells} cells.",
        FAILS: "identity, which mixes no layers, is as good or better everywhere.",
        UNTOLD: "Both have to be measured at the same R.",
    }
    verdict = from_duel(
        f"The learned transform ({PAPER}) leaves less error than none (identity)", found, ""
    )
    return verdict._replace(why=words[verdict.word])


def transform_scores(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Scores of unquantized splits, where only the transform differs."""
    return from_scores(
        f"The learned transform ({PAPER}) trains to a better score than none",
        studies,
        {"refta bits=16": "refta bits=16 transform=identity"},
        "Same R and unquantized weights, so that the transform alone differs.",
    )


def refinement_errors(stacks: list[Row]) -> Verdict:
    """Weight errors of every stack."""
    found = duel(
        pick(stacks, method="refta", start="refined"),
        pick(stacks, method="refta", start="one shot"),
        CELL,
    )
    return from_duel(
        "Ours: refinement leaves less weight error than one shot",
        found,
        "Factors and residual are refitted to each other in turn.",
    )


def calibration_errors(stacks: list[Row]) -> Verdict:
    """Output errors of every stack, and the price in weight error."""
    ours, plain = (pick(stacks, method="refta", start=start) for start in ("calibrated", "refined"))
    weight = duel(ours, plain, CELL)
    return from_duel(
        "Ours: calibration leaves less output error than refinement alone",
        duel(ours, plain, CELL, "output_ratio"),
        f"It fits outputs, not weights: weight error is {weight}.",
    )


def starts_scores(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Whether less error at the start shows after training."""
    return from_scores(
        "Ours: refinement and calibration show in the score after training",
        studies,
        {"refta": "refta refine=0", "refta calibrated": "refta"},
        "4-bit weights, same R, rows and steps; only the split differs.",
    )


def from_scores(
    claim: str, studies: dict[Study, dict[str, Score]], sides: dict[str, str], why: str
) -> Verdict:
    """The verdict of paired differences of like rank; level speaks against a claim of being better."""
    pairs = {
        one: [
            pair
            for ours, theirs in sides.items()
            for pair in differences(methods, ours, theirs)
            if pair.ours.adapter == pair.theirs.adapter
        ]
        for one, methods in studies.items()
    }
    told = [pair.word for found in pairs.values() for pair in found if pair.word != "untold"]
    better = told.count("better")
    return Verdict(
        claim,
        score_lines(pairs),
        judge(better, len(told) - better),
        f"{why} Of {len(told)} differences that can be told {better} are better, {told.count('level')} level and "
        f"{told.count('worse')} worse.",
    )


def smaller_blocks(models: list[Row]) -> Verdict:
    """The refined split beside blocks so small that they take its bytes; the calibrated one by its outputs."""
    verdict = from_duel(
        "For the same bytes a split leaves less weight error than a smaller block does",
        duel_for_bytes(models),
        "Smaller blocks spend the bytes on scales and train nothing; factors are what is trained anyway.",
    )
    outputs = duel_for_bytes(models, "calibrated", "output_ratio")
    return verdict._replace(
        measured=[*verdict.measured, f"output error of the calibrated split: {outputs}"]
    )


def rivals(models: list[Row]) -> list[Verdict]:
    """Peers with equally many high-precision numbers: one shot beside one shot, alternating beside alternating."""
    claims = [
        (
            "pissa",
            "one shot",
            "ratio",
            "PiSSA, as many numbers in 16 bit: one shot leaves less weight error",
        ),
        (
            "loftq",
            "refined",
            "ratio",
            "LoftQ, as many numbers in 16 bit: refinement leaves less weight error",
        ),
        (
            "qera",
            "calibrated",
            "output_ratio",
            "QERA, as many components: calibration leaves less output error",
        ),
        (
            "craft",
            "one shot",
            "ratio",
            "CRAFT's Tucker part, as many bytes: one shot leaves less weight error",
        ),
        (
            "craft",
            "refined",
            "ratio",
            "CRAFT's Tucker part, as many bytes: refinement leaves less weight error",
        ),
    ]
    return [
        from_duel(
            claim,
            duel(
                pick(models, method="refta", transform=PAPER, start=start),
                pick(models, method=rival, start=(None, start)),
                ("model", "quant_type", "rank"),
                value,
            ),
            f"{PAPER}, {start}, at every format and R that both have.",
        )
        for rival, start, value, claim in claims
    ]
