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
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build(LlamaForCausalLM, LlamaConfig(**decoder_sizes(32)))
    model.save_pretrained(root / "dense")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(root / "dense")
    qrefta.prepare(root / "dense", out=root / "4bit", rank=4, progress=False)
    rows = [{"question": f"{start} is", "answer": word} for start in ("the sky", "sky the") for word in ("red", "blue")]
    (root / "tasks").mkdir()
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "tasks" / "colors.yaml").write_text(TASK.replace("FILE", str(root / "rows.json")))
    return root, fast, rows


def test_the_score_is_that_of_the_prepared_model(folders):
    """Against its own probabilities, question by question."""
    root, tokenizer, rows = folders
    model = qrefta.load(root / "4bit").eval()
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["question"])["input_ids"]])).logits[0, -1]
        red, blue = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("red", "blue"))
        right += row["answer"] == ("red" if red > blue else "blue")
    found = qrefta.evaluate(root / "4bit", ["colors"], include_path=root / "tasks")
    assert math.isclose(found["results"]["colors"]["acc,none"], right / len(rows))
    command = ["evaluate", str(root / "4bit"), "colors", "--include-path", str(root / "tasks"), "--limit", "4"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert f"{right / len(rows):.4g}" in shown.output


def test_unknown_tasks_are_refused(folders):
    root = folders[0]
    with pytest.raises(ValueError, match=r"tasks shades are unknown; .*: colors"):
        qrefta.evaluate(root / "4bit", ["colors", "shades"], include_path=root / "tasks")
    with pytest.raises(ValueError, match="no task is given"):
        qrefta.evaluate(root / "4bit", [], include_path=root / "tasks")
