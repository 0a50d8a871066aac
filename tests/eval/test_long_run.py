"""The slope that judges a long run, on lines, steps and noise."""

import random

import pytest

from eval.robustness.long_run import BLOCKS, measure, trend


def test_a_line_has_its_slope_and_noise_none():
    chance = random.Random(0)
    noise = [100 + chance.gauss(0, 5) for _ in range(2000)]
    slope, error, median = trend(noise)
    assert abs(slope) < 3 * error
    assert median == pytest.approx(100, rel=0.02)
    slope, error, _ = trend([value + 0.02 * at for at, value in enumerate(noise)])
    assert slope == pytest.approx(0.02, abs=3 * error)
    assert slope > 10 * error


def test_a_rise_at_the_beginning_is_no_trend():
    assert trend([float(min(at, 150)) for at in range(2000)])[0] == 0


@pytest.mark.slow
def test_a_short_run_is_measured(tmp_path):
    """Every evaluation and checkpoint is counted; only kept checkpoints and the model remain."""
    row = measure(tmp_path, "prepared", 2 * BLOCKS, 20, threads=1)
    assert (row["steps"], row["evaluations"], row["saves"]) == (60, 5, 3)
    assert row["finite"]
    assert row["test_loss"] < row["test_loss_before"]
    assert row["memory_median"] > 1e8
    assert 0 < row["time_median"] < 10
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-40",
        "checkpoint-60",
    }
