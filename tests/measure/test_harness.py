"""lm-evaluation-harness on a prepared folder, by one command."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from tests.models import build, decoder_sizes

pytest.importorskip("lm_eval")

TASK = """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared language model with a tokenizer of words, and a task of four questions."""
    root = tmp_path_factory.mktemp("evaluate")
    words = ["[UNK]", "[EOS]", "red", "blue", "the", "sky", "is"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build(LlamaForCausalLM, LlamaConfig(**decoder_sizes(32)))
    model.save_pretrained(root / "dense")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(root / "dense")
    qrefta.prepare_checkpoint(root / "dense", root / "4bit", rank=4, progress=False)
    rows = []
    for start in ("the sky", "sky the"):
        for word in ("red", "blue"):
            rows.append({"question": f"{start} is", "answer": word})
    (root / "tasks").mkdir()
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "tasks" / "colors.yaml").write_text(TASK.replace("FILE", str(root / "rows.json")))
    return root, fast, rows


@pytest.fixture(scope="module")
def right(folders):
    """Whether the prepared model's answer is right, by its logits, for every question."""
    root, tokenizer, rows = folders
    model = qrefta.load(root / "4bit").eval()
    answers = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["question"])["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        red = logits[tokenizer.convert_tokens_to_ids("red")]
        blue = logits[tokenizer.convert_tokens_to_ids("blue")]
        answers.append(row["answer"] == ("red" if red > blue else "blue"))
    return answers


@pytest.mark.parametrize(("batch_size", "limit"), [(3, None), (8, 1)])
def test_the_score_is_the_prepared_models(folders, right, batch_size, limit):
    root, _, _ = folders
    count = limit or len(right)
    scores = qrefta.evaluate(
        root / "4bit", ["colors"], include_path=root / "tasks", batch_size=batch_size, limit=limit
    )
    assert math.isclose(scores["results"]["colors"]["acc,none"], sum(right[:count]) / count)
    assert scores["n-samples"]["colors"] == {"original": 4, "effective": count}
    assert scores["config"]["model_dtype"] == torch.float32  # as saved


def test_the_command_prints_the_score(folders, right):
    root, _, _ = folders
    options = ["--include-path", str(root / "tasks"), "--limit", "4"]
    command = ["evaluate", str(root / "4bit"), "colors", *options]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert f"{sum(right) / len(right):.4g}" in shown.output


def test_unknown_tasks_are_refused(folders):
    root, _, _ = folders
    with pytest.raises(ValueError, match=r"tasks shades are unknown; .*: colors"):
        qrefta.evaluate(root / "4bit", ["colors", "shades"], include_path=root / "tasks")
    with pytest.raises(ValueError, match="no task is given"):
        qrefta.evaluate(root / "4bit", [], include_path=root / "tasks")


def test_nothing_is_printed_of_git_and_two_configs(folders, tmp_path, monkeypatch, capfd, recwarn):
    """In a folder that is no git repository, on a prepared model."""
    root, _, _ = folders
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    scores = qrefta.evaluate(root / "4bit", ["colors"], include_path=root / "tasks", limit=1)
    assert scores["git_hash"] is None
    assert "not a git repository" not in capfd.readouterr().err
    assert not [one for one in recwarn if "quantization_config" in str(one.message)]
