"""The study of the start: the command runs up to its first step, on a tiny model."""

import shutil
import sys

import pytest

from eval.report.readme_table import startup_table
from eval.rows import read
from eval.studies import startup
from tests.models import tiny_llama
from tests.train.talk import words

pytest.importorskip("trl")


@pytest.fixture
def model(tmp_path):
    tiny_llama(64).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_command_is_measured(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    startup.run("qrefta finetune R=24", str(model), 1, 2, 1, rows)
    [row] = read(rows)
    assert 1 < row["first_step_s"] == row["longest_s"]  # imports alone take a second
    assert "| qrefta finetune R=24 |" in startup_table([row])


def test_a_process_that_ends_early_is_an_error(model, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="R=24 ended without a checkpoint"):
        startup.run("qrefta finetune R=24", str(model), 1, 2, 1, None)
