"""The study of gathering: its row, and the error that it measures."""

import pytest
import torch

from eval.rows import read
from eval.studies import calibration_cost
from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from tests.models import tiny_llama
from tests.tiny import color_rows, tiny_tokenizer


def test_a_row_holds_seconds_ratios_and_the_error(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in color_rows(200, seed=5)))
    rows = tmp_path / "rows.jsonl"
    threads = torch.get_num_threads()
    calibration_cost.run(
        str(tmp_path / "model"), tmp_path / "text.txt", 512, 2, 4, threads=threads, rows=rows
    )
    (row,) = read(rows)
    assert row["tokens"] == 512
    assert row["n"] == 2
    assert row["prepare_rank"] == 4
    assert row["prepare_s"] > 0
    assert row["ratio"] > 0 < row["cpu_ratio"]
    assert 0 < row["relative_error"] < 1e-5


def test_the_error_is_that_of_the_moments():
    model = tiny_llama()
    stacks = find_stacks(model)
    batch = {"input_ids": torch.arange(2, 18)[None]}
    moments = gather_moments(model, stacks, [batch], progress=False)
    assert calibration_cost._relative_error(model, stacks, batch, moments) < 1e-6
    moments.of(stacks[0].modules[-1]).mul_(1.5)
    error = calibration_cost._relative_error(model, stacks, batch, moments)
    assert error == pytest.approx(0.5, rel=1e-5)
