"""The paper's claims and ours, judged by the rows: holds, holds in part, does not, or unknown."""

from typing import NamedTuple

from eval.peers.bases import UNCALIBRATED, Base
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
from eval.report.kept import (
    TARGETS,
    Group,
    Target,
    divergence,
    groups,
    rank_correlation,
)
from eval.report.scores import CONFIDENCE, Difference, Score, Study, differences, scores
from eval.tasks.smollm2 import NAME as SMOLLM2
from eval.tasks.task import METRICS

HOLDS = "holds"
IN_PART = "holds in part"
FAILS = "does not hold"
UNDECIDED = "cannot be decided here"
PREDICTS = 0.9  # rank correlation from which one number stands for another
NAMED = 4  # exceptions that are named
CELL = ("model", "stack", "quant_type", "transform", "rank")

THRESHOLDS = (
    f"Errors within {TIE:.0%} of each other are level; step times within {TIMING:.0%} are equal. "
    f"Score differences "
    f"are paired over seeds and judged by their {CONFIDENCE:.0%} interval (Student's t). If half "
    "of it is as wide as the rival's gain over the head alone, the task cannot decide (undecided). "
    "Better and worse: the interval excludes zero. Level: a loss above "
    f"{METRICS['accuracy'].margin:.1%} accuracy ({METRICS['matthews'].margin} Matthews "
    f"correlation, {METRICS['perplexity'].margin:.1%} of the perplexity) is excluded. Undecided "
    "otherwise. A claim holds if no cell contradicts it, does not hold if no cell supports it, "
    "and holds in part otherwise."
)


class Verdict(NamedTuple):
    """One line of the table.

    Attributes:
        measured: lines with numbers from rows.
        word: HOLDS, IN_PART, FAILS or UNDECIDED.
    """

    claim: str
    measured: list[str]
    word: str
    why: str


def verdicts(files: dict[str, list[Row]]) -> list[Verdict]:
    """All verdicts: how much of a model is kept, the paper's claims, ours, then the rivals."""
    errors = files.get("quant_error", [])
    cost = files.get("cost", [])
    studies = scores(files.get("accuracy", []))
    stacks = pick(errors, kind="stack")
    models = pick(errors, kind="model")
    languages = groups(files.get("kld", []), "language")
    return [
        *(kept_target(languages, target) for target in TARGETS),
        default_against_bitsandbytes(languages),
        weight_error_predicts(languages),
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
    """The verdict for the numbers of supporting and contradicting cells."""
    if for_it + against == 0:
        return UNDECIDED
    return HOLDS if against == 0 else FAILS if for_it == 0 else IN_PART


def kept_target(languages: list[Group], target: Target) -> Verdict:
    """Whether a base of SmolLM2 has at most the KL divergences that were aimed at."""
    lines = []
    good = 0
    bad = 0
    for group in languages:
        for row in group.rows:
            if group.model != SMOLLM2 or Base.of(row) != target.base:
                continue
            for text in set(target.limits) & set(group.measured):
                found = divergence(row, text)
                limit = target.limits[text]
                met = found <= limit
                good += met
                bad += not met
                lines.append(
                    f"{text}, {group.tokens:,} tokens: {found:.3f}, {limit:.3f} was aimed at, "
                    f"{row['bits_per_weight']:.2f} bits"
                )
    limits = " and ".join(f"{limit:.3f} on {text}" for text, limit in target.limits.items())
    return Verdict(
        f"{target.base.label}: KL divergence to 16 bits of at most {limits}",
        sorted(lines) or ["not measured"],
        judge(good, bad),
        f"{SMOLLM2}; the limits were set before this was measured.",
    )


def default_against_bitsandbytes(languages: list[Group]) -> Verdict:
    """KL divergence of `prepare` without text and settings, and of bitsandbytes' NF4."""
    lines = []
    good = 0
    bad = 0
    for group in languages:
        plain = [row for row in group.rows if Base.of(row) == Base("bitsandbytes")]
        ours = [row for row in group.rows if Base.of(row) == UNCALIBRATED()]
        for text in group.measured if plain and ours else []:
            found = divergence(ours[0], text)
            theirs = divergence(plain[0], text)
            good += found <= theirs
            bad += found > theirs
            lines.append(f"{group.model}, {text}: {found:.3f}, bitsandbytes {theirs:.3f}")
    return Verdict(
        "Without text to calibrate on, the default keeps at least as much as bitsandbytes NF4",
        lines or ["not measured"],
        judge(good, bad),
        "Mean KL divergence to the 16-bit model.",
    )


def weight_error_predicts(languages: list[Group]) -> Verdict:
    """Rank correlation of squared weight error and KL divergence over the bases of each model."""
    lines = []
    good = 0
    bad = 0
    for group in languages:
        for text in group.measured:
            weight = rank_correlation(group.rows, "weight_error", text)
            output = rank_correlation(group.rows, "output_error", text)
            if weight is None or output is None:
                continue
            good += weight >= PREDICTS
            bad += weight < PREDICTS
            lines.append(
                f"{group.model}, {text}: {weight:.2f} over {len(group.rows)} bases; output error "
                f"{output:.2f}"
            )
    return Verdict(
        "Weight error tells which base keeps the model",
        lines or ["not measured"],
        judge(good, bad),
        "Spearman's rank correlation of squared weight error and mean KL divergence; it tells if "
        f"it is at least {PREDICTS}. The last number is the same for the squared error of the "
        "layers' outputs.",
    )


def below_baseline(stacks: list[Row]) -> Verdict:
    """The paper's headline claim, for one-shot splits of every stack."""
    splits = [row for row in pick(stacks, method="refta", start="one shot") if row["rank"]]
    lines = []
    below = 0
    for name in distinct(splits, "quant_type"):
        ratios = [row["ratio"] for row in pick(splits, quant_type=name)]
        below += sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{FORMATS[name]}: below in {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} "
            f"cells, "
            f"{min(ratios):.3f} to {max(ratios):.3f} times"
        )
    return Verdict(
        "The residual quantizes with less error than the whole weight: ||W_res - Q(W_res)||^2 < "
        "||W - Q(W)||^2",
        lines or ["not measured"],
        judge(below, len(splits) - below),
        "One-shot splits of every stack, R and transform: the principal part removes the largest "
        "singular values "
        "before quantization.",
    )


def falls_with_rank(stacks: list[Row]) -> Verdict:
    """Strict decrease, for every stack, format, transform and start."""
    count, exceptions = monotone(stacks)
    good = count - len(exceptions)
    bad = len(exceptions)
    return Verdict(
        "The error falls as R grows",
        [f"{good} of {count} series fall at every step of R", *exception_lines(exceptions)],
        judge(good, bad),
        "A series is one stack, format, transform and start over all measured R.",
    )


def exception_lines(exceptions: dict[str, list[str]]) -> list[str]:
    """At most NAMED series, and the number of further ones."""
    lines = [f"{name}: {'; '.join(steps)}" for name, steps in list(exceptions.items())[:NAMED]]
    return [*lines, f"and {len(exceptions) - NAMED} more"] if len(exceptions) > NAMED else lines


def fewer_numbers(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Adapter parameters of ReFTA relative to LoRA."""
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
        "It trains a fraction of LoRA's parameters",
        lines or ["not measured"],
        judge(fewer, len(found) - fewer),
        "R (in + out) per stack against r (in + out) per layer: fewer only if R < r * layers. In "
        "a shallow model "
        "this leaves few components per layer.",
    )


def beside_lora(studies: dict[Study, dict[str, Score]], ours: str, theirs: str) -> Verdict:
    """Scores: level or better with fewer trainable parameters; other pairs do not count."""
    pairs = {one: differences(methods, ours, theirs) for one, methods in studies.items()}
    shown = {
        one: [pair for pair in found if pair.ours.adapter <= pair.theirs.adapter]
        for one, found in pairs.items()
    }
    told = [pair for found in shown.values() for pair in found if pair.word != "undecided"]
    fewer = [pair for pair in told if pair.ours.adapter < pair.theirs.adapter]
    good = sum(pair.word != "worse" for pair in fewer)
    equal = [pair for pair in told if pair.ours.adapter == pair.theirs.adapter]
    worse = sum(pair.word == "worse" for pair in equal)
    note = f"{worse} of {len(equal)} pairs of equal size are worse. " if equal else ""
    bits = "16-bit weights" if "bits=16" in ours else "4-bit weights"
    name = NAMES[ours.split()[0]]
    return Verdict(
        f"{name}: {'QLoRA' if theirs == 'qlora' else 'LoRA'}'s score or better with fewer "
        f"trainable parameters ({bits})",
        score_lines(shown),
        judge(good, len(fewer) - good),
        f"{good} of {len(fewer)} decided pairs with fewer parameters are level or better. "
        f"{note}Pairs with more "
        "parameters are in the tables of the tasks.",
    )


def score_lines(pairs: dict[Study, list[Difference]]) -> list[str]:
    """One line per pair, with its task."""
    return [f"{one.task}: {pair}" for one, found in pairs.items() for pair in found] or [
        "not measured"
    ]


def one_knob(models: list[Row]) -> Verdict:
    """Errors of the whole model when only R changes."""
    count, exceptions = monotone(models)
    good = count - len(exceptions)
    bad = len(exceptions)
    return Verdict(
        "One number, R, trades size for error",
        [
            f"{good} of {count} series of the whole model fall at every step of R",
            *exception_lines(exceptions),
        ],
        judge(good, bad),
        "R selects the largest tensor singular values of a stack over all its layers; no layer "
        "needs a rank. "
        "All stacks have the same R.",
    )


def no_rebuilding(cost: list[Row]) -> Verdict:
    """Time and peak memory of building a dense weight in every step, relative to ReFTA."""
    ours = pick(cost, method="refta R=64")
    dense = pick(cost, method="rebuilding R=64")
    match = ("setting", "device", "threads", "dtype", "checkpointing")
    lines = []
    good = 0
    bad = 0
    for row in dense:
        for other in pick(ours, **{key: row[key] for key in match}):
            time = row["step_s"] / other["step_s"]
            peak = row["peak_bytes"] / other["peak_bytes"]
            with_it = "with" if row["checkpointing"] else "without"
            lines.append(
                f"{row['setting']}, {with_it} checkpointing: rebuilding takes {time:.2f} times "
                f"the time and {peak:.2f} "
                "times the memory"
            )
            good += time > 1 + TIMING and peak > 1
            bad += not (time > 1 + TIMING and peak > 1)
    return Verdict(
        "Training without rebuilding a dense weight saves time and memory",
        lines or ["not measured"],
        judge(good, bad),
        "Both with R = 64; low-rank products replace A diag(u) B. If R is near the width, "
        "rebuilding wins.",
    )


def from_duel(claim: str, found: Duel, why: str) -> Verdict:
    """The verdict on a claim of less error; level cells contradict it."""
    return Verdict(claim, [str(found)], judge(found.wins, len(found.quotients) - found.wins), why)


def transform_errors(models: list[Row]) -> Verdict:
    """Errors of the whole model with and without the transform."""
    found = transforms_duel(models)
    cells = len(found.quotients)
    words = {
        HOLDS: f"{PAPER} beats identity everywhere.",
        IN_PART: f"identity is as good or better in {cells - found.wins} of {cells} cells.",
        FAILS: "identity, which mixes no layers, is as good or better everywhere.",
        UNDECIDED: "Both must be measured at the same R.",
    }
    verdict = from_duel(
        f"The learned transform ({PAPER}) leaves less error than none (identity)", found, ""
    )
    return verdict._replace(why=words[verdict.word])


def transform_scores(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Scores of unquantized splits that differ in the transform only."""
    return from_scores(
        f"The learned transform ({PAPER}) trains to a better score than none",
        studies,
        {"refta bits=16": "refta bits=16 transform=identity"},
        "Same R and unquantized weights: only the transform differs.",
    )


def refinement_errors(stacks: list[Row]) -> Verdict:
    """Weight errors of every stack, refined and one shot."""
    found = duel(
        pick(stacks, method="refta", start="refined"),
        pick(stacks, method="refta", start="one shot"),
        CELL,
    )
    return from_duel(
        "Ours: refinement leaves less weight error than one shot",
        found,
        "Factors and residual are refitted alternately.",
    )


def calibration_errors(stacks: list[Row]) -> Verdict:
    """Output errors of every stack, and the cost in weight error."""
    ours, plain = (pick(stacks, method="refta", start=start) for start in ("calibrated", "refined"))
    weight = duel(ours, plain, CELL)
    return from_duel(
        "Ours: calibration leaves less output error than refinement alone",
        duel(ours, plain, CELL, "output_ratio"),
        f"Calibration fits outputs, not weights: weight error is {weight}.",
    )


def starts_scores(studies: dict[Study, dict[str, Score]]) -> Verdict:
    """Whether less error at the start improves the score after training."""
    return from_scores(
        "Ours: refinement and calibration improve the score after training",
        studies,
        {"refta": "refta refine=0", "refta calibrated": "refta"},
        "4-bit weights, same R, rows and steps; only the split differs.",
    )


def from_scores(
    claim: str, studies: dict[Study, dict[str, Score]], sides: dict[str, str], why: str
) -> Verdict:
    """The verdict on a claim of a better score, from pairs of equal size; level contradicts it."""
    pairs = {
        one: [
            pair
            for ours, theirs in sides.items()
            for pair in differences(methods, ours, theirs)
            if pair.ours.adapter == pair.theirs.adapter
        ]
        for one, methods in studies.items()
    }
    told = [pair.word for found in pairs.values() for pair in found if pair.word != "undecided"]
    better = told.count("better")
    return Verdict(
        claim,
        score_lines(pairs),
        judge(better, len(told) - better),
        f"{why} {len(told)} differences are decided: {better} better, {told.count('level')} level, "
        f"{told.count('worse')} worse.",
    )


def smaller_blocks(models: list[Row]) -> Verdict:
    """Refined split against smaller blocks of the same size; calibrated split by output error."""
    verdict = from_duel(
        "For the same bytes a split leaves less weight error than a smaller block",
        duel_for_bytes(models),
        "Smaller blocks spend the bytes on scales, which are not trainable; factors are trainable.",
    )
    outputs = duel_for_bytes(models, "calibrated", "output_ratio")
    return verdict._replace(
        measured=[*verdict.measured, f"output error of the calibrated split: {outputs}"]
    )


def rivals(models: list[Row]) -> list[Verdict]:
    """Peers with equally many high-precision parameters, each against the matching start."""
    claims = [
        (
            "pissa",
            "one shot",
            "ratio",
            "PiSSA, as many 16-bit parameters: one shot leaves less weight error",
        ),
        (
            "loftq",
            "refined",
            "ratio",
            "LoftQ, as many 16-bit parameters: refinement leaves less weight error",
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
            f"{PAPER}, {start}, at every format and R measured for both.",
        )
        for rival, start, value, claim in claims
    ]
