"""What rows of `eval.studies.accuracy` say: a method's score over seeds, and differences of two methods seed by seed."""

from collections import defaultdict
from math import inf, isfinite
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t

from eval.report.findings import Row, Table, number, pick
from eval.tasks.task import METRICS, merit

MINUS = "\N{MINUS SIGN}"
RANK_WORDS = ("R=", "r=", "ranks=", "trained_params=")  # of a method's words: how large it is
CONFIDENCE = (
    0.95  # a difference of scores counts where zero lies outside its interval, by Student's t
)


class Study(NamedTuple):
    """Runs that may be compared: the same task, model, steps and rows."""

    task: str
    model: str
    steps: int
    batch_size: int
    train_rows: int
    validation_rows: int
    test_rows: int
    max_length: int


class Score(NamedTuple):
    """A method in a study.

    Attributes:
        values: test score by seed, in the metric's own unit.
        adapter: trained numbers without the head, which all methods train.
        at_edge: the learning rate is the least or the greatest of several that were tried.
        cpu_s: CPU seconds of training, mean over seeds.
        peak_bytes: most bytes of a training step, mean over seeds; None where nothing trains.
        test_rows: rows that each seed scores on.
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
        """Over seeds."""
        return mean(self.values.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; None for a single one."""
        return standard_error(list(self.values.values()))


class Difference(NamedTuple):
    """One method's score less another's, on the seeds that both have; above 0 where the first is better.

    Attributes:
        gain: how much the other is better than the head alone; None where that was not measured.
    """

    ours: Score
    theirs: Score
    mean: float
    standard_error: float | None
    seeds: int
    gain: float | None

    @property
    def word(self) -> str:
        """better, worse or level; or untold: one seed, a run that diverged, or noise as wide as what adapting gains."""
        if self.standard_error is None or not isfinite(self.standard_error):
            return "untold"
        margin = t.ppf((1 + CONFIDENCE) / 2, self.seeds - 1) * self.standard_error
        if abs(self.mean) > margin:
            return "better" if self.mean > 0 else "worse"
        return "untold" if self.gain is not None and self.gain <= margin else "level"

    def __str__(self) -> str:
        """For example: refta R=15 bits=16 less lora r=8: +0.1 ± 0.1 points (level; 0.31 times the trained numbers).

        With the learning rates that were chosen, where they differ.
        """
        rates = self.ours.learning_rate, self.theirs.learning_rate
        chosen = f"; learning rates {rates[0]:g} and {rates[1]:g}" if rates[0] != rates[1] else ""
        return f"{self.ours.method} less {self.theirs.method}: {self.amount} ({self.word}; {self.numbers}{chosen})"

    @property
    def numbers(self) -> str:
        """How many numbers the first trains beside the second."""
        share = self.ours.adapter / self.theirs.adapter
        return "as many trained numbers" if share == 1 else f"{share:.2g} times the trained numbers"

    @property
    def amount(self) -> str:
        """Mean and standard error: percentage points for accuracies, the metric's unit else."""
        scale, unit = (100, " points") if self.ours.metric == "accuracy" else (1, "")
        digits = 2 if self.ours.metric == "accuracy" else 3
        error = (
            "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        )
        return f"{scale * self.mean:+.{digits}f}{error}{unit}".replace("-", MINUS)


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for fewer than two values, infinite where a run diverged."""
    if not all(map(isfinite, values)):
        return inf
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def scores(rows: list[Row]) -> dict[Study, dict[str, Score]]:
    """Every method that was scored, by study, at the learning rate that its search has chosen.

    Of a seed measured again the last row counts; rows at other rates, of a search over fewer of them, do not.
    """
    tried: dict[tuple[Study, str], list[Row]] = defaultdict(list)
    for row in pick(rows, kind="search"):
        tried[study(row), row["method"]].append(row)
    found: dict[Study, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in pick(rows, kind="score"):
        searched = tried[study(row), row["method"]]
        if not searched or max(searched, key=merit)["learning_rate"] == row["learning_rate"]:
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
    """Paired over seeds; None where no seed has both."""
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
    """Of all pairs of methods with these words, where RANK_WORDS stand for any rank."""
    pairs = [
        difference(methods[one], methods[other], methods.get("head-only"))
        for one in methods
        for other in methods
        if kind(one) == ours and kind(other) == theirs
    ]
    return [pair for pair in pairs if pair is not None]


def kind(method: str) -> str:
    """A method without its rank: refta R=48 bits=16 -> refta bits=16."""
    return " ".join(word for word in method.split() if not word.startswith(RANK_WORDS))


def score_title(name: str, methods: dict[str, Score]) -> str:
    """ReFTA beside the LoRA whose count of trained numbers is nearest to its own; else who has the best score."""
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
        "untold": "cannot be told from",
    }
    return f"{name}: {pair.ours.method} {words[pair.word]} {pair.theirs.method} with {pair.numbers} ({pair.amount})"


def _distance(ours: int, theirs: int) -> float:
    return max(ours, theirs) / min(ours, theirs)


def shown(score: Score) -> str:
    """Mean ± standard error: per cent for accuracies, the metric's unit else."""
    scale, digits, unit = {"accuracy": (100, 1, " %"), "perplexity": (1, 2, "")}.get(
        score.metric, (1, 3, "")
    )
    error = "" if score.standard_error is None else f" ± {scale * score.standard_error:.{digits}f}"
    return f"{scale * score.mean:.{digits}f}{error}{unit}".replace("-", MINUS)


def score_table(methods: dict[str, Score]) -> Table:
    """A line a method, those with fewer trained numbers first."""
    lines = [
        [score.method, f"{score.adapter:,}", shown(score), str(len(score.values)),
         f"{score.learning_rate:g}{' (edge)' * score.at_edge}", f"{score.cpu_s:.0f}",
         number(None if score.peak_bytes is None else score.peak_bytes / 1e6, ".0f")]
        for score in sorted(methods.values(), key=lambda score: score.adapter)
    ]  # fmt: skip
    metric = next(iter(methods.values())).metric
    header = ["method", "adapter parameters", f"{metric} ± standard error", "seeds", "learning rate", "CPU s",
              "peak MB"]  # fmt: skip
    return Table(header, lines)


def difference_table(pairs: list[Difference]) -> Table:
    """A line a pair: share of trained numbers, difference, and how it reads."""
    lines = [
        [pair.ours.method, pair.theirs.method, number(pair.ours.adapter / pair.theirs.adapter, ".2f"), pair.amount,
         str(pair.seeds), pair.word] for pair in pairs
    ]  # fmt: skip
    return Table(
        ["method", "beside", "trained numbers", "difference ± standard error", "seeds", "reads"],
        lines,
    )


def noise(methods: dict[str, Score]) -> str:
    """How far the test rows alone let an accuracy stray, and which learning rates lie on the edge of the grid."""
    edges = [score.method for score in methods.values() if score.at_edge]
    text = (
        f"Chosen at the edge of the grid of learning rates: {', '.join(edges)}. " if edges else ""
    )
    best = max(methods.values(), key=lambda score: score.mean)
    if best.metric == "accuracy":
        spread = (best.mean * (1 - best.mean) / best.test_rows) ** 0.5
        text += (
            f"{best.test_rows:,} test rows: another draw of them would move an accuracy of {best.mean:.1%} by "
            f"{spread:.1%} (binomial standard error), all methods together; differences are paired and move less."
        )
    return text
