"""Differences over several tasks: points, the mean with its interval, equal and smaller sizes."""

import pytest
from scipy.stats import t

from eval.report.comparison import gained
from eval.report.over_tasks import over_tasks, over_tasks_table, shown
from eval.report.scores import MINUS, Score, Study, difference

SEEDS = range(1, 6)
WIGGLE = (0.01, -0.01, 0.02, -0.02, 0.0)


def study(task, steps=64, model="org/model"):
    return Study(task, model, steps, 32, 2000, 500, 2000, 64)


def score(method, mean, adapter, metric="accuracy", wiggle=0.0):
    values = {seed: mean + wiggle * WIGGLE[seed - 1] for seed in SEEDS}
    return Score(method, metric, values, adapter, 1e-3, False, 1.0, None, 100)


def methods(*scores):
    return {one.method: one for one in scores}


def test_points_are_hundredths_and_per_cents_of_a_perplexity_and_tasks_count_alike():
    studies = {
        study("a"): methods(
            score("refta R=48", 0.82, 100),
            score("refta R=12", 0.9, 25),
            score("qlora r=8", 0.8, 100),
        ),
        study("b"): methods(
            score("refta R=60", 38.0, 25, "perplexity"),
            score("qlora r=2", 40.0, 25, "perplexity"),
        ),
    }
    (found,) = over_tasks(studies)
    assert (found.ours, found.theirs, found.size) == ("refta", "qlora", "as many")
    assert list(found.by_task) == ["a (model, 64 steps)", "b (model, 64 steps)"]
    assert found.mean == pytest.approx((2 + 5) / 2)
    assert found.better == 2
    assert shown(found) == "+3.5 (+3.5 to +3.5)"


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_study_of_a_task_and_model_counts(order):
    """Whatever the order of the rows."""

    def pair(ours):
        return methods(score("refta R=4", ours, 10), score("qlora r=2", 0.8, 10))

    studies = [
        (study("a", 60), pair(0.7)),
        (study("a", 120), pair(0.82)),
        (study("a", 30, "other"), pair(0.81)),
        (study("b"), pair(0.8)),
    ]
    (found,) = over_tasks(dict(studies[::order]))
    differences = {label: round(100 * one.mean) for label, one in found.by_task.items()}
    assert differences == {
        "a (model, 120 steps)": 2,
        "a (other, 30 steps)": 1,
        "b (model, 64 steps)": 0,
    }


def test_the_interval_has_the_freedom_of_the_noisy_tasks():
    noisy = [
        methods(score("refta R=4", 0.8, 10, wiggle=wiggle), score("qlora r=2", 0.8, 40))
        for wiggle in (1.0, 0.5)
    ]
    (found,) = over_tasks(dict(zip(map(study, "ab"), noisy, strict=True)))
    assert found.size == "a quarter"
    errors = [100 * wiggle * (0.001 / 4) ** 0.5 / 5**0.5 for wiggle in (1.0, 0.5)]
    squares = [error**2 for error in errors]
    freedom = sum(squares) ** 2 / sum(one**2 / 4 for one in squares)
    half = t.ppf(0.975, freedom) * sum(squares) ** 0.5 / 2
    assert found.interval == pytest.approx((-half, half))


def test_of_several_sizes_in_a_task_the_largest_counts():
    sizes = [
        score(f"{name} R={rank}", mean, adapter)
        for name, means in (("refta", (0.82, 0.9)), ("qlora", (0.8, 0.8)))
        for rank, mean, adapter in zip((48, 12), means, (100, 25), strict=True)
    ]
    for order in (sizes, sizes[::-1]):
        (found,) = [
            group
            for group in over_tasks({study(task): methods(*order) for task in "ab"})
            if group.size == "as many"
        ]
        assert found.mean == pytest.approx(2)


def test_one_task_or_another_size_is_no_group():
    ours, theirs = score("refta R=4", 0.8, 10), score("qlora r=2", 0.7, 20)
    assert over_tasks({study(task): methods(ours, theirs) for task in "ab"}) == []
    equal = ours._replace(adapter=20)
    assert over_tasks({study("a"): methods(equal, theirs)}) == []
    dense = equal._replace(method="refta R=4 bits=16")
    assert over_tasks({study(task): methods(dense, theirs) for task in "ab"}) == []
    nothing = [score(name, 0.7, size) for name, size in (("head-only", 0), ("qlora r=2", 20))]
    noisy = score("refta R=4", 0.8, 20, wiggle=1.0)
    assert over_tasks({study(task): methods(noisy, *nothing) for task in "ab"}) == []
    table = over_tasks_table(over_tasks({study(task): methods(equal, theirs) for task in "ab"}))
    tasks = "a (model, 64 steps), b (model, 64 steps)"
    assert [line[:4] for line in table.rows] == [["refta", "qlora", "as many", tasks]]


@pytest.mark.parametrize(
    ("ours", "theirs", "metric", "text"),
    [
        (0.82, 0.8, "accuracy", "+2.0 points (+2.0 to +2.0)"),
        (42.0, 40.0, "perplexity", "-5.0 % (-5.0 to -5.0)"),
    ],
)
def test_the_readme_states_points_or_per_cents(ours, theirs, metric, text):
    pair = difference(
        score("refta R=4", ours, 10, metric), score("qlora r=2", theirs, 10, metric), None
    )
    assert gained(pair) == text.replace("-", MINUS)
