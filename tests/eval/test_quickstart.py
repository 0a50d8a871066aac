"""The quickstart with a language model: its questions, and the whole run on a small model."""

import json
import sysconfig
from pathlib import Path

import pytest

from eval.quickstart import Options, chat
from eval.report.readme_table import quickstart_chat_table
from eval.rows import read
from eval.tasks import questions
from eval.tasks.questions import docstring_questions, file_questions, stdlib_questions
from tests.models import tiny_llama
from tests.pages import language_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
SOURCE = '''
def shown(a):
    """Return the thing that is shown to a reader.

    More text.
    """

def _hidden():
    """Return the thing that is hidden from a reader."""

class Thing:
    """A thing that has a method and a name."""

    def turn(self):
        """Turn the thing around by half a circle."""

    def silent(self):
        pass
'''


@pytest.fixture(scope="module")
def found():
    return questions.split(list(stdlib_questions(STDLIB)))


def test_public_names_are_asked_for_and_answered_by_first_sentences(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "mod.py").write_text(SOURCE)
    asked = [(row.text, row.answer) for row in file_questions(tmp_path / "pkg/mod.py", tmp_path)]
    assert asked == [
        ("What does `pkg.mod.shown` do?", "Return the thing that is shown to a reader."),
        ("What is `pkg.mod.Thing`?", "A thing that has a method and a name."),
        ("What does `pkg.mod.Thing.turn` do?", "Turn the thing around by half a circle."),
    ]


@pytest.mark.slow
def test_modules_are_held_out_and_no_answer_leaks(found):
    train, test = found
    assert len(train) > 1000
    assert len(test) > 300
    assert not {row.module for row in train} & {row.module for row in test}
    held_out = {run for row in test for run in questions.runs(row.words)}
    assert not any(held_out & questions.runs(row.words) for row in train)
    assert len({row.words for row in train}) == len(train)


@pytest.mark.slow
def test_sizes_cut_the_rows_from_the_front():
    small, large = (docstring_questions(size, 5)["train"].to_list() for size in (20, 40))
    assert large[:20] == small
    with pytest.raises(ValueError, match=r"9000000 rows were requested.*request fewer"):
        docstring_questions(9_000_000, 5)


@pytest.mark.slow
def test_the_whole_run_on_a_small_model(tmp_path, capsys):
    """Every figure is printed, kept as a row, and shown in a table."""
    source = tmp_path / "dense"
    dense = tiny_llama(hidden=64)
    dense.save_pretrained(source)
    language_tokenizer().save_pretrained(source)
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    data = tmp_path / "chat.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 60)
    rows = tmp_path / "rows.jsonl"
    sizes = (2 * dense.config.num_hidden_layers, 3, 40, 6)
    chat.run(Options(str(source), str(data), *sizes, tmp_path / "out", rows, 0))
    printed = capsys.readouterr().out
    for words in ("bitsandbytes NF4", "QLoRA r=2", "Answers of the 4-bit model", "qrefta chat"):
        assert words in printed
    kept = read(rows)
    losses = {row["method"]: row for row in kept if row["kind"] == "training"}
    ours, theirs = losses["qrefta"], losses["QLoRA r=2"]
    assert ours["trained_parameters"] == theirs["trained_parameters"]
    assert ours["test_loss"] < ours["test_loss_before"]
    (run,) = [row for row in kept if row["kind"] == "run"]
    assert run["reload_difference"] == 0
    assert 0 < run["merge_difference"] < 0.1
    assert (tmp_path / "out" / "merged" / "config.json").exists()
    table = quickstart_chat_table(kept)
    assert f"| qrefta | {ours['trained_parameters']:,} | {ours['test_loss_before']:.3f} |" in table
    assert "| w5 w6 | w7 w8 |" in table
