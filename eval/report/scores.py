"""Scores of methods over seeds, and paired differences, from rows of `eval.studies.accuracy`."""

from collections import defaultdict
from math import inf, isfinite
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t

from eval.peers.forms import FORMS
from eval.report.findings import Row, Table, number, pick
from eval.tasks.task import METRICS, RATES, best_rate
from qrefta.methods import METHODS

MINUS = "\N{MINUS SIGN}"
RANK_WORDS = ("R=", "r=", "ranks=", "trained_params=")  # the words of a method that set its size
CONFIDENCE = 0.95  # of the interval of a difference (Student's t)


class Study(NamedTuple):
    """Runs that can be compared: equal task, model, steps and rows."""

    task: str
    model: str
    steps: int
    batch_size: int
    train_rows: int
    validation_rows: int
    test_rows: int
    max_length: int


class Score(NamedTuple):
    """A method's score in a study.

    Attributes:
        values: test score by seed.
        adapter: trainable parameters without the head, which all methods train.
        at_edge: whether the chosen learning rate is the smallest or largest of those tried.
        cpu_s: CPU seconds of training, mean over seeds.
        peak_bytes: peak memory of a training step, mean over seeds; None if nothing trains.
        test_rows: test rows of each seed.
    """

    method: str
    metric: str
    values: dict[int, float]
    adapter: int
    learning_rate: float
    at_edge: bool
    cpu_s: float
    peak_bytes: float | None
    test_rows: int

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values.values())

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return standard_error(list(self.values.values()))


class Difference(NamedTuple):
    """Score difference of two methods on common seeds; positive if the first is better.

    Attributes:
        gain: improvement of the second over the head alone; None if not measured.
    """

    ours: Score
    theirs: Score
    mean: float
    standard_error: float | None
    seeds: int
    gain: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean (Student's t); None for one seed or a diverged run."""
        if self.standard_error is None or not isfinite(self.standard_error):
            return None
        half = t.ppf((1 + CONFIDENCE) / 2, self.seeds - 1) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def learned(self) -> bool:
        """Whether the rival's gain over the head alone exceeds half the interval, or is unknown."""
        if self.gain is None or self.interval is None:
            return True
        low, high = self.interval
        return self.gain > (high - low) / 2

    @property
    def scale(self) -> float:
        """Points of a difference of 1: hundredths, or per cents of the rival's score."""
        relative = METRICS[self.ours.metric].relative
        return 100 / (abs(self.theirs.mean) if relative else 1)

    @property
    def word(self) -> str:
        """better, worse, level (no worse than by the metric's margin), or undecided.

        Undecided: one seed, a diverged run, an interval as wide as the rival's gain over the head
        alone, or one that reaches from above 0 to below the margin.
        """
        if self.interval is None:
            return "undecided"
        low, high = self.interval
        if not self.learned:
            return "undecided"
        if low > 0:
            return "better"
        if high < 0:
            return "worse"
        return "level" if low > -self.margin else "undecided"

    @property
    def margin(self) -> float:
        """The loss of score that still counts as none."""
        metric = METRICS[self.ours.metric]
        return metric.margin * (abs(self.theirs.mean) if metric.relative else 1)

    def __str__(self) -> str:
        """For example: refta R=15 bits=16 minus lora r=8: +0.1 ± 0.1 points (level; 0.31 times the
        ...).

        The learning rates are added if they differ.
        """
        rates = self.ours.learning_rate, self.theirs.learning_rate
        chosen = f"; learning rates {rates[0]:g} and {rates[1]:g}" if rates[0] != rates[1] else ""
        pair = f"{self.ours.method} minus {self.theirs.method}"
        return f"{pair}: {self.amount} ({self.word}; {self.numbers}{chosen})"

    @property
    def numbers(self) -> str:
        """Trainable parameters of the first relative to the second."""
        share = self.ours.adapter / self.theirs.adapter
        return (
            "as many trainable parameters"
            if share == 1
            else f"{share:.2g} times the trainable parameters"
        )

    @property
    def amount(self) -> str:
        """Mean and standard error, in percentage points for accuracy."""
        scale, unit = (100, " points") if self.ours.metric == "accuracy" else (1, "")
        digits = 2 if self.ours.metric == "accuracy" else 3
        error = (
            "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        )
        return f"{scale * self.mean:+.{digits}f}{error}{unit}".replace("-", MINUS)


def standard_error(values: list[float]) -> float | None:
    """Standard error of the mean; None for one value, infinite if a run diverged."""
    if not all(map(isfinite, values)):
        return inf
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def scores(rows: list[Row]) -> dict[Study, dict[str, Score]]:
    """Scores by study and method, at the learning rate that the search chose.

    The last row of a seed counts. Rows at other learning rates, from a smaller search, do not
    count; nor do rates between `RATES`, on which one method was searched and others were not.
    """
    tried: dict[tuple[Study, str], list[Row]] = defaultdict(list)
    for row in pick(rows, kind="search"):
        if row["learning_rate"] not in RATES:
            continue
        tried[study(row), row["method"]].append(row)
    found: dict[Study, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in pick(rows, kind="score"):
        searched = tried[study(row), row["method"]]
        if not searched or best_rate(searched) == row["learning_rate"]:
            found[study(row)][row["method"]][row["seed"]] = row
    return {
        one: {
            method: _score(
                list(by_seed.values()), {row["learning_rate"] for row in tried[one, method]}
            )
            for method, by_seed in methods.items()
        }
        for one, methods in found.items()
    }


def study(row: Row) -> Study:
    """The study that a row belongs to."""
    return Study(*(row[field] for field in Study._fields))


def _score(rows: list[Row], tried: set[float]) -> Score:
    last = rows[-1]
    rate = last["learning_rate"]
    return Score(
        method=last["method"],
        metric=last["metric"],
        values={row["seed"]: row["value"] for row in rows},
        adapter=last["trained_parameters"] - last["head_parameters"],
        learning_rate=rate,
        at_edge=len(tried) > 1 and rate in (min(tried), max(tried)),
        cpu_s=mean(row["cpu_s"] for row in rows),
        peak_bytes=None if last["peak_bytes"] is None else mean(row["peak_bytes"] for row in rows),
        test_rows=last["n"],
    )


def difference(ours: Score, theirs: Score, head: Score | None) -> Difference | None:
    """Difference paired over seeds; None without a common seed."""
    sign = 1 if METRICS[ours.metric].more_is_better else -1
    seeds = sorted(ours.values.keys() & theirs.values.keys())
    if not seeds:
        return None
    values = [sign * (ours.values[seed] - theirs.values[seed]) for seed in seeds]
    common = [] if head is None else [seed for seed in seeds if seed in head.values]
    gain = (
        mean(sign * (theirs.values[seed] - head.values[seed]) for seed in common)
        if common
        else None
    )
    return Difference(ours, theirs, mean(values), standard_error(values), len(seeds), gain)


def differences(methods: dict[str, Score], ours: str, theirs: str) -> list[Difference]:
    """Differences of all pairs of these two kinds of methods, of any rank."""
    pairs = [
        difference(methods[one], methods[other], methods.get("head-only"))
        for one in methods
        for other in methods
        if kind(one) == ours and kind(other) == theirs
    ]
    return [pair for pair in pairs if pair is not None]


def rival_of(method: str) -> str | None:
    """The peer of a method of qrefta or of a form: lora on 16 bits, qlora on 4; None for peers."""
    words = method.split()
    if words[0] not in (*METHODS, *FORMS):
        return None
    return "lora" if "bits=16" in words else "qlora"


def signed(mean: float, interval: tuple[float, float] | None, unit: str = "") -> str:
    """For example: +0.4 points (-0.2 to +1.0)."""
    text = f"{mean:+.1f}{unit}"
    if interval is not None:
        low, high = interval
        text += f" ({low:+.1f} to {high:+.1f})"
    return text.replace("-", MINUS)


def kind(method: str) -> str:
    """A method without its rank: refta R=48 bits=16 -> refta bits=16."""
    return " ".join(word for word in method.split() if not word.startswith(RANK_WORDS))


def score_title(name: str, methods: dict[str, Score]) -> str:
    """ReFTA against the LoRA of the nearest size; without such a pair the best method.

    A single method is compared with nothing, and the title says so.
    """
    if len(methods) == 1:
        (only,) = methods.values()
        return f"{name}: {only.method} alone so far, {shown(only)} {only.metric}"
    pairs = differences(methods, "refta bits=16", "lora") or differences(methods, "refta", "qlora")
    if not pairs:
        sign = 1 if METRICS[next(iter(methods.values())).metric].more_is_better else -1
        best = max(methods.values(), key=lambda score: sign * score.mean)
        return f"{name}: {best.method} scores best, {shown(best)} {best.metric}"
    pair = min(pairs, key=lambda pair: _distance(pair.ours.adapter, pair.theirs.adapter))
    words = {
        "better": "beats",
        "worse": "loses to",
        "level": "is level with",
        "undecided": "is not distinguishable from",
    }
    result = f"{pair.ours.method} {words[pair.word]} {pair.theirs.method}"
    return f"{name}: {result} with {pair.numbers} ({pair.amount})"


def _distance(ours: int, theirs: int) -> float:
    return max(ours, theirs) / min(ours, theirs)


def shown(score: Score) -> str:
    """Mean ± standard error, in per cent for accuracy."""
    scale, digits, unit = {"accuracy": (100, 1, " %"), "perplexity": (1, 2, "")}.get(
        score.metric, (1, 3, "")
    )
    error = "" if score.standard_error is None else f" ± {scale * score.standard_error:.{digits}f}"
    return f"{scale * score.mean:.{digits}f}{error}{unit}".replace("-", MINUS)


def score_table(methods: dict[str, Score]) -> Table:
    """One line per method, the smallest first."""
    lines = [
        [
            score.method,
            f"{score.adapter:,}",
            shown(score),
            str(len(score.values)),
            f"{score.learning_rate:g}{' (edge)' * score.at_edge}",
            f"{score.cpu_s:.0f}",
            number(None if score.peak_bytes is None else score.peak_bytes / 1e6, ".0f"),
        ]
        for score in sorted(methods.values(), key=lambda score: score.adapter)
    ]
    metric = next(iter(methods.values())).metric
    header = [
        "method",
        "adapter parameters",
        f"{metric} ± standard error",
        "seeds",
        "learning rate",
        "CPU s",
        "peak MB",
    ]
    return Table(header, lines)


def difference_table(pairs: list[Difference]) -> Table:
    """One line per pair: relative size, difference and its meaning."""
    lines = [
        [
            pair.ours.method,
            pair.theirs.method,
            number(pair.ours.adapter / pair.theirs.adapter, ".2f"),
            pair.amount,
            str(pair.seeds),
            pair.word,
        ]
        for pair in pairs
    ]
    return Table(
        [
            "method",
            "compared with",
            "relative size",
            "difference ± standard error",
            "seeds",
            "meaning",
        ],
        lines,
    )


def noise(methods: dict[str, Score]) -> str:
    """Noise of an accuracy from the draw of test rows; learning rates at the edge of the grid."""
    edges = [score.method for score in methods.values() if score.at_edge]
    text = f"Learning rate at the edge of the grid: {', '.join(edges)}. " if edges else ""
    best = max(methods.values(), key=lambda score: score.mean)
    if best.metric == "accuracy":
        spread = (best.mean * (1 - best.mean) / best.test_rows) ** 0.5
        text += (
            f"With {best.test_rows:,} test rows an accuracy of {best.mean:.1%} has a binomial "
            f"standard error of "
            f"{spread:.1%}, common to all methods; paired differences vary less."
        )
    return text
