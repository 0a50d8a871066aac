"""Differences of two methods over several tasks: their mean, with an interval.

A difference in points is a hundredth of an accuracy or a correlation, or one per cent of a rival's
perplexity, which is a hundredth of a nat. Every task counts alike.
"""

from collections import defaultdict
from math import sqrt
from statistics import mean
from typing import NamedTuple

from scipy.stats import t

from eval.report.findings import Table
from eval.report.scores import (
    CONFIDENCE,
    Difference,
    Score,
    Study,
    differences,
    kind,
    rival_of,
    signed,
)

# Trainable parameters relative to the rival's.
SIZES = {"as many": (0.95, 1.05), "a quarter": (0.2, 0.3)}
MINIMUM = 2  # tasks


class Over(NamedTuple):
    """Differences of one pair of methods, one a task.

    Attributes:
        ours, theirs: methods without their ranks, which differ from task to task.
        size: of `SIZES`.
        by_task: the difference of every task, by its name, model and steps.
    """

    ours: str
    theirs: str
    size: str
    by_task: dict[str, Difference]

    @property
    def mean(self) -> float:
        """Mean difference in points; positive if ours is better."""
        return mean(pair.scale * pair.mean for pair in self.by_task.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean over seeds, for these tasks (Welch and Satterthwaite)."""
        pairs = self.by_task.values()
        if any(pair.interval is None for pair in pairs):
            return None
        squares = [(pair.scale * (pair.standard_error or 0.0)) ** 2 for pair in pairs]
        freedoms = [pair.seeds - 1 for pair in pairs]
        total = sum(squares)
        if total == 0:
            return self.mean, self.mean
        weights = sum(one**2 / freedom for one, freedom in zip(squares, freedoms, strict=True))
        half = t.ppf((1 + CONFIDENCE) / 2, total**2 / weights) * sqrt(total) / len(squares)
        return self.mean - half, self.mean + half

    @property
    def better(self) -> int:
        """Tasks on which ours is better by the mean over seeds."""
        return sum(pair.mean > 0 for pair in self.by_task.values())


def over_tasks(studies: dict[Study, dict[str, Score]], theirs: str = "qlora") -> list[Over]:
    """Every method whose rival it is, on all tasks where both were scored; the best mean first.

    If a task was studied several times with a model, the study with most steps counts, then most
    test rows; of several sizes in a study, the largest. Tasks on which the rival learned nothing
    are left out.
    """
    found: dict[tuple[str, str, str], dict[tuple[str, str], tuple[str, Difference]]]
    found = defaultdict(dict)
    ordered = sorted(studies.items(), key=lambda item: (item[0].steps, item[0].test_rows))
    for study, methods in ordered:
        for ours in sorted({kind(method) for method in methods if rival_of(method) == theirs}):
            pairs = differences(methods, ours, theirs)
            for pair in sorted(pairs, key=lambda pair: pair.ours.adapter):
                share = pair.ours.adapter / pair.theirs.adapter
                for size, (least, most) in SIZES.items():
                    if least <= share <= most and pair.learned:
                        model = study.model.rpartition("/")[2]
                        label = f"{study.task} ({model}, {study.steps} steps)"
                        found[ours, theirs, size][study.task, study.model] = label, pair
    groups = [
        Over(*key, dict(pairs.values())) for key, pairs in found.items() if len(pairs) >= MINIMUM
    ]
    return sorted(groups, key=lambda group: -group.mean)


def over_tasks_table(groups: list[Over]) -> Table:
    """One line per pair of methods."""
    header = [
        "method",
        "compared with",
        "trainable parameters",
        "tasks",
        "mean difference in points (95 % interval)",
        "better on",
    ]
    lines = [
        [
            group.ours,
            group.theirs,
            group.size,
            ", ".join(group.by_task),
            shown(group),
            f"{group.better} of {len(group.by_task)}",
        ]
        for group in groups
    ]
    return Table(header, lines)


def shown(group: Over) -> str:
    """The mean difference with its interval, in points."""
    return signed(group.mean, group.interval)
