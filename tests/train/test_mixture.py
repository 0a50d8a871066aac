"""Several data sets in one run."""

import pytest
from datasets import Dataset, IterableDataset
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.train.calibration import task_batches
from qrefta.train.tasks import TASKS
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.mixture import Mixture, load_mixture, mixed_recipe, parse_weight
from tests.models import tiny_llama
from tests.train.talk import QUESTION, chat_rows, words, write_rows

pytest.importorskip("trl")


def answers(color, count):
    return [{"messages": [*QUESTION, {"role": "assistant", "content": color}]}] * count


@pytest.fixture
def sources(tmp_path):
    return {
        str(write_rows(tmp_path / "red.jsonl", answers("red", 400))): 3.0,
        str(write_rows(tmp_path / "blue.jsonl", answers("blue", 200))): 1.0,
    }


def test_rows_are_drawn_by_weight_until_a_data_set_is_used_up(sources, tokenizer):
    mixture = load_mixture("sft", TASKS["sft"].load, sources, 0)
    model = tiny_llama()
    recipe = mixed_recipe(lambda data: chat_recipe(model, tokenizer, data, 32), mixture, 0)
    red, blue = (
        sum(tokenizer.convert_tokens_to_ids(color) in ids for ids in recipe.train["input_ids"])
        for color in ("red", "blue")
    )
    assert red == 360  # its training rows, each once
    assert red + blue == len(recipe.train)
    assert 0.68 < red / (red + blue) < 0.82  # 3 of 4, four standard errors
    assert len(recipe.test) == 40 + 20
    batches = task_batches("sft", model, tokenizer, mixture, max_length=32)
    assert sum(len(batch["input_ids"]) for batch in batches) > 0


def test_the_rows_of_a_larger_source_are_drawn_from_all_of_it(tmp_path, tokenizer):
    """Its first rows alone may be of one kind; the draw is the same for the same seed."""
    for name, rows in {
        "train": answers("red", 200) + answers("blue", 200),
        "test": answers("sky", 2),
    }.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    small = write_rows(tmp_path / "small.jsonl", answers("sky", 50))
    mixture = load_mixture("sft", TASKS["sft"].load, {str(tmp_path): 1.0, str(small): 1.0}, 0)

    def drawn(seed):
        recipe = mixed_recipe(
            lambda data: chat_recipe(tiny_llama(), tokenizer, data, 32), mixture, seed
        )
        return list(recipe.train["input_ids"])

    first = drawn(0)
    red, blue = (tokenizer.convert_tokens_to_ids(color) for color in ("red", "blue"))
    assert min(sum(color in ids for ids in first) for color in (red, blue)) > 5
    assert first == drawn(0) != drawn(1)


def test_finetune_takes_weights(sources, tokenizer, tmp_path):
    model = qrefta.prepare(tiny_llama(), rank=8, progress=False)
    result = qrefta.finetune(
        model, tokenizer, sources, tmp_path / "out", task="sft", max_steps=2, progress=False
    )
    assert result.steps == 2


@pytest.mark.slow
def test_the_command_takes_further_data_sets(sources, tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    first, second = sources
    paths = [str(tmp_path / "model"), first, str(tmp_path / "out")]
    options = f"--task sft --loss last --mix {second}:0.5 --rank 8 --max-steps 2 --padding-free"
    shown = CliRunner().invoke(app, ["finetune", *paths, *options.split()], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "Saved in" in shown.output


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.jsonl:0.3", ("a.jsonl", 0.3)),
        ("a.jsonl", ("a.jsonl", 1.0)),
        ("name:config:2", ("name:config", 2.0)),
        ("name:config", ("name:config", 1.0)),
    ],
)
def test_a_weight_stands_behind_the_source(text, parsed):
    assert parse_weight(text) == parsed


@pytest.mark.parametrize("text", ["b.jsonl:50%", "data/b.csv:half", "name:config:50%"])
def test_a_weight_that_is_no_number_is_named(text):
    weight = text.rpartition(":")[2]
    with pytest.raises(ValueError, match=f"has the weight '{weight}'; it must be a number"):
        parse_weight(text)


def test_unusable_mixtures_are_refused(sources, tokenizer, tmp_path):
    first = next(iter(sources))
    with pytest.raises(ValueError, match="must be a positive number"):
        load_mixture("sft", TASKS["sft"].load, {first: 0.0}, 0)
    with pytest.raises(ValueError, match="several data sets are for the tasks lm, sft, dpo, grpo"):
        load_mixture("image", TASKS["image"].load, {first: 1.0}, 0)
    plain = [{"prompt": "what", "chosen": "red", "rejected": "blue"}] * 4
    turns = [{"question": "what", "chosen": "red", "rejected": "blue"}] * 4
    parts = [
        TASKS["dpo"].load(write_rows(tmp_path / f"{name}.jsonl", rows), seed=0)
        for name, rows in (("plain", plain), ("turns", turns))
    ]
    with pytest.raises(ValueError, match="different columns and cannot be mixed"):
        mixed_recipe(
            lambda data: TASKS["dpo"].recipe(tiny_llama(), tokenizer, data),
            Mixture(parts, [1, 1]),
            0,
        )


@pytest.mark.parametrize("kind", [dict, list, IterableDataset])
def test_data_of_other_kinds_are_refused_in_words(kind, tmp_path):
    rows = Dataset.from_list(chat_rows(4))
    data = {dict: {"train": rows}, list: chat_rows(4), IterableDataset: rows.to_iterable_dataset()}
    model = qrefta.prepare(tiny_llama(), rank=2, progress=False)
    data = data[kind]
    with pytest.raises(ValueError, match=rf"dataset is a {kind.__name__}; .*has from_list"):
        qrefta.finetune(model, words(), data, tmp_path / "run", task="sft", progress=False)
